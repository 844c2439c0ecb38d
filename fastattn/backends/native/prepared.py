"""Calls of q, k and v alone as the native modules take them quickest: decided once, then addresses and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...problem import Inputs, Problem
from ..base import Results, empty_grad, empty_results, in_memory
from ..layout_key import layout_key
from .call import Tensors, by_name, described, native_inputs

_MAX_LAYOUTS = 64  # of output gradients whose calls a prepared kind keeps

Allocate = Callable[[Tensor], Tensor]


def _allocator(wanted: Tensor, like: Tensor) -> Allocate:
    """The quickest way to memory laid out as `wanted`, given a tensor laid out as `like`; torch.empty is slower."""
    if torch.empty_like(like, device="meta").stride() == wanted.stride() and like.shape == wanted.shape:
        return torch.empty_like
    shape, stride, dtype, device = wanted.shape, wanted.stride(), wanted.dtype, wanted.device
    return lambda _: torch.empty_strided(shape, stride, dtype=dtype, device=device)


NAMES = ("q", "k", "v", "out", "lse", "residual", "dout", "dq", "dk", "dv")
"""The tensors of a step, in the order in which the native modules take their addresses; forward has six of them."""


class Step(NamedTuple):
    """A forward or backward pass of a native description `call`: `method` runs it.

    workspace_bytes: the memory that it needs beside its tensors.
    """

    operation: str
    call: Any
    method: Callable[..., None]
    workspace_bytes: int


def addresses_of(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where their values begin; 0 for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]


class PreparedCalls(ABC):
    """See `Prepared`. A subclass knows how a step is run, and whether without lse."""

    needs_lse = False
    """Whether the kernels write lse even where nobody asked for it."""

    def __init__(self, call: Any, problem: Problem, inputs: Inputs) -> None:
        results = empty_results(problem, inputs.q, for_backward=True)
        named = by_name(results)
        self.layout_key: Hashable = layout_key(inputs.q, inputs.k, inputs.v, *named.values())
        self._call, self._problem = call, problem
        self._forward = self._step("forward", native_inputs(problem, inputs) | named)
        lse = results.lse
        self._allocate_out = _allocator(results.out, inputs.q)
        self._lse_like = torch.empty((), dtype=lse.dtype, device=lse.device).expand(lse.shape)  # of one number
        self._allocate_lse = _allocator(lse, self._lse_like)
        self._residual_of_out = problem.dtype != problem.accumulator  # see Results
        self._allocate_grads: list[Allocate] = []  # made when they are first needed: growing caches never need them
        self._gradients: dict[Any, Step] = {}

    def _step(self, operation: str, tensors: Tensors) -> Step:
        call = described(self._call, self._problem, tensors)
        method = call.attend if operation == "forward" else call.gradients
        return Step(operation, call, method, self._workspace_bytes(operation, call, tensors))

    def _workspace_bytes(self, operation: str, call: Any, tensors: Tensors) -> int:
        return 0

    @abstractmethod
    def _run(self, step: Step, tensors: Sequence[Tensor | None]) -> None:
        """Runs a step on tensors in the order of NAMES; None where there is none."""

    def infer(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Prepared.infer`."""
        out = self._allocate_out(q)
        lse = self._allocate_lse(self._lse_like) if self.needs_lse else None
        self._run(self._forward, (q, k, v, out, lse, None))
        return out

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Prepared.forward`."""
        results = self._allocate_results(q)
        self._run(self._forward, (q, k, v, *results))
        return results

    def _allocate_results(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = self._allocate_out(q), self._allocate_lse(self._lse_like)
        return out, lse, self._allocate_out(q) if self._residual_of_out else self._allocate_lse(self._lse_like)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, results: Sequence[Tensor], dout: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """See `Prepared.backward`."""
        dout = in_memory(dout)
        if not self._allocate_grads:
            self._allocate_grads = [_allocator(empty_grad(x), x) for x in (q, k, v)]
        wanted = zip(needs, self._allocate_grads, (q, k, v), strict=True)
        grads = tuple([allocate(x) if need else None for need, allocate, x in wanted])
        key = (dout.stride(), needs)
        step = self._gradients.get(key)  # once: another thread may clear it meanwhile
        if step is None:
            if len(self._gradients) >= _MAX_LAYOUTS:
                self._gradients.clear()
            tensors = {"q": q, "k": k, "v": v, **by_name(Results(*results)), "dout": dout}
            tensors |= {f"d{name}": grad for name, grad in zip("qkv", grads, strict=True) if grad is not None}
            self._gradients[key] = step = self._step("backward", tensors)
        self._run(step, (q, k, v, *results, dout, *grads))
        return grads
