"""The backends: what computes an attention call. One interface, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

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

    residual: what rounding took from a result on which gradients depend; both have twice the digits together. None
    where no backward pass follows.
    * In half precision, of out, times 256, in out's dtype and layout. The score gradients of a row cancel against
      delta = dout . out; its error goes to all of them with one sign, and from there, times the mean of the keys, into
      the gradient of q.
    * In float32 and float64, of lse, in its dtype and layout. Probabilities are recomputed as exp(score - lse), so the
      absolute error of lse, which grows with the scores, is their relative error.
    Rows that saw nothing but a sink are marked by inf, by the backends that have masks: nothing of them may reach the
    gradients, not even a dout that is NaN.
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

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Results:
        """The results, for a backward pass."""

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, results: Results, dout: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v, None where not needed; dout may have any strides."""


class Backend(Protocol):
    """Computes validated calls. Results are allocated with `empty_results`."""

    name: str

    def why_unavailable(self) -> str | None:
        """None if the backend can run on this machine, else a sentence that says what is missing."""

    def why_not(self, problem: Problem) -> str | None:
        """None if the backend can compute the call, else a sentence that says what stands in the way."""

    def remarks(self, problem: Problem, inputs: Inputs) -> Sequence[str]:
        """Sentences on what the backend has to do before it can compute the call, such as copies; for `explain`."""

    def prepare(self, problem: Problem, inputs: Inputs) -> Prepared | None:
        """A shorter way for calls like this one, which is dense and has no other tensors than q, k and v.

        None if there is none.
        """

    def forward(self, problem: Problem, inputs: Inputs, for_backward: bool) -> Results:
        """The results of a dense or varlen call; for_backward: with the residual."""

    def backward(
        self, problem: Problem, inputs: Inputs, results: Results, dout: Tensor, dlse: Tensor | None, needs: Needs
    ) -> Grads:
        """The gradients of a dense or varlen call; dlse None stands for zeros."""

    def decode(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(out, lse) of a call with a cache, after writing the new keys and values into it."""


def empty_results(problem: Problem, q: Tensor, for_backward: bool) -> Results:
    """Uninitialised memory for what `Backend.forward` gives."""
    out, lse = empty_out(problem, q), empty_lse(problem)
    return Results(out, lse, torch.empty_like(_rounded(problem, out, lse)) if for_backward else None)


def _rounded(problem: Problem, out: Tensor, lse: Tensor) -> Tensor:
    """The result that `Results.residual` belongs to."""
    return out if problem.dtype != problem.accumulator else lse


def empty_out(problem: Problem, q: Tensor) -> Tensor:
    """Uninitialised memory for out: the dimensions before the last in q's stride order, head_dim_v innermost.

    So a caller whose q is a view of (batch, seqlen, heads, head_dim) gets out in that order too and can merge heads
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
