"""The interface of a backend with its defaults, what goes in and out, and the memory of results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..problem import Inputs, Problem


class Needs(NamedTuple):
    """Which gradients a backward pass must compute."""

    q: bool
    k: bool
    v: bool
    bias: bool
    sinks: bool


class Grads(NamedTuple):
    """Gradients, each with the shape and dtype of its tensor; None where not needed."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None


class Results(NamedTuple):
    """What a forward pass gives, and its backward pass gets.

    residual: the rounding error of the result on which gradients depend; both have twice the digits together. None
    where no backward pass follows.
    * In half precision, the error of out, times 256, in out's dtype and layout. The score gradients of a row cancel
      against delta = dout . out. An error of delta goes to all of them with one sign, and from there, times the mean
      of the keys, into the gradient of q.
    * In float32 and float64, the error of lse, in its dtype and layout. Probabilities are recomputed as
      exp(score - lse), so the absolute error of lse, which grows with the scores, is their relative error.
    Backends with masks mark rows that saw nothing but a sink by inf. Nothing of such a row may reach the gradients, not
    even a dout that is NaN.
    """

    out: Tensor
    lse: Tensor
    residual: Tensor | None = None


class Prepared(Protocol):
    """Dense calls of q, k and v alone, of one kind: what can be decided beforehand has been.

    layout_key: what `fastattn.backends.layout_key` must say of q, k, v, out, lse and residual.
    """

    layout_key: Hashable

    def infer(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """out, lse and residual, for a backward pass."""

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, results: Sequence[Tensor], dout: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v, None where not needed; dout may have any strides."""


class Preference(IntEnum):
    """How much a backend is wanted for a call. Automatic choice tries the highest first."""

    LAST_RESORT = 0  # no fused kernels
    SLOWER = 1  # another backend is known to be faster for this call
    NORMAL = 2  # the order of `dispatch.BACKENDS` decides


class Backend(ABC):
    """Computes validated calls. Results are allocated with `empty_results`."""

    name: str

    def why_unavailable(self) -> str | None:
        """None if the backend can run on this machine, else a sentence that says what is missing."""
        return None

    def why_not(self, problem: Problem) -> str | None:
        """None if the backend can compute the call, else a sentence that says what stands in the way."""
        return None

    def preference(self, problem: Problem) -> Preference:
        """How much the backend is wanted for the call, whether or not it can compute it."""
        return Preference.NORMAL

    def notes(self, problem: Problem, inputs: Inputs) -> Sequence[str]:
        """Sentences on what the backend has to do before it can compute the call, such as copies; for `explain`."""
        return ()

    def prepare(self, problem: Problem, inputs: Inputs) -> Prepared | None:
        """A shorter way for calls like this one, which is dense and has no other tensors than q, k and v.

        None if there is none.
        """
        return None

    @abstractmethod
    def forward(self, problem: Problem, inputs: Inputs, for_backward: bool) -> Results:
        """The results of a dense or varlen call; for_backward: with the residual."""

    @abstractmethod
    def backward(
        self, problem: Problem, inputs: Inputs, results: Results, dout: Tensor, dlse: Tensor | None, needs: Needs
    ) -> Grads:
        """The gradients of a dense or varlen call; dlse None stands for zeros."""

    @abstractmethod
    def decode(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(out, lse) of a call with a cache, after writing the new keys and values into it."""


# -------------------------------------------------------------------------------------------------------------- devices

ArchitectureT = TypeVar("ArchitectureT", covariant=True)


class Machine(Protocol[ArchitectureT]):
    """Where the kernels of a GPU backend run: on GPUs, or on what stands in for them.

    Each backend adds how its kernels are run, and says what its plans depend on: its type of architecture.
    """

    def why_unavailable(self) -> str | None:
        """None if kernels can run here, else a sentence."""

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if kernels can run on tensors of this dtype there, else a sentence."""

    def architecture(self, device: torch.device) -> ArchitectureT:
        """The device, as far as plans and configurations depend on it."""


# --------------------------------------------------------------------------------------------------------------- limits

MAX_SEQLEN = 2**28
"""Less than this many rows: sums of two positions and a window stay within 32 bits."""


def why_too_large(problem: Problem, max_head_dim: int) -> str | None:
    """None if head_dim and head_dim_v are at most that, else a sentence."""
    for name in ("head_dim", "head_dim_v"):
        if getattr(problem, name) > max_head_dim:
            return f"{name} is {getattr(problem, name)}, and this backend takes at most {max_head_dim}."
    return None


def why_too_long(problem: Problem) -> str | None:
    """None if both sequence lengths are less than MAX_SEQLEN, else a sentence."""
    for name in ("seqlen_q", "seqlen_k"):
        if getattr(problem, name) >= MAX_SEQLEN:
            return f"{name} is {getattr(problem, name)}, and this backend takes less than {MAX_SEQLEN}."
    return None


# --------------------------------------------------------------------------------------------------------------- memory


def in_memory(x: Tensor) -> Tensor:
    """The tensor with its values where its address says: not negated on reading, not zero without memory."""
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if x._is_zerotensor() else x.resolve_neg()


def finish_append(inputs: Inputs, k: Tensor, v: Tensor) -> None:
    """Ends a call that appended to the caches, or to the copies k and v of them that the kernels were given."""
    if inputs.k_new is None:
        return
    for cache, used in ((inputs.k, k), (inputs.v, v)):
        if used is not cache:
            cache.copy_(used)
        elif not cache.is_inference():
            torch.autograd.graph.increment_version(cache)


def empty_results(problem: Problem, q: Tensor, for_backward: bool) -> Results:
    """Uninitialised memory for what `Backend.forward` gives."""
    out, lse = empty_out(problem, q), empty_lse(problem)
    return Results(out, lse, torch.empty_like(_rounded(problem, out, lse)) if for_backward else None)


def _rounded(problem: Problem, out: Tensor, lse: Tensor) -> Tensor:
    """The result that `Results.residual` belongs to."""
    return out if problem.dtype != problem.accumulator else lse


def empty_out(problem: Problem, q: Tensor) -> Tensor:
    """Uninitialised memory for out: the dimensions before the last in q's stride order, head_dim_v innermost.

    A caller whose q is a view of (batch, seqlen, heads, head_dim) gets out in that order too, and can merge heads
    without a copy.
    """
    shape = (*q.shape[:-1], problem.head_dim_v)
    return torch.empty_permuted(shape, _outer_order(q), dtype=q.dtype, device=q.device)


def empty_lse(problem: Problem) -> Tensor:
    """Uninitialised memory for lse: (batch, heads_q, seqlen_q), or (heads_q, total_q) for varlen; contiguous."""
    rows = (problem.heads_q, problem.seqlen_q)
    shape = rows if problem.kind == "varlen" else (problem.batch, *rows)
    return torch.empty(shape, dtype=problem.accumulator, device=problem.device)


def empty_grad(like: Tensor) -> Tensor:
    """Uninitialised memory for a gradient: dense, the dimensions before the last in `like`'s order."""
    return torch.empty_permuted(like.shape, _outer_order(like), dtype=like.dtype, device=like.device)


def _outer_order(x: Tensor) -> tuple[int, ...]:
    """The dimensions by descending stride, the last one always innermost, as kernels want it."""
    if x.ndim == 0:
        return ()
    outer, strides = range(x.ndim - 1), x.stride()
    return (*sorted(outer, key=lambda d: -strides[d]), x.ndim - 1)  # stable: ties keep the dimensions' order
