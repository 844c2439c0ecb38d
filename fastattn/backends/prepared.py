"""Calls of q, k and v alone as the native modules take them quickest: decided once, then addresses and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layouts import layouts
from ..problem import Inputs, Problem
from . import Results, empty_grad, empty_results
from .native import Tensors, by_name, described, in_memory, native_inputs

_MOST_LAYOUTS = 64  # of output gradients whose calls a prepared kind keeps

Allocate = Callable[[Tensor], Tensor]


def _allocator(wanted: Tensor, like: Tensor) -> Allocate:
    """The quickest way to memory laid out as `wanted`, given a tensor laid out as `like`; torch.empty is slower."""
    if torch.empty_like(like, device="meta").stride() == wanted.stride() and like.shape == wanted.shape:
        return torch.empty_like
    shape, stride, dtype, device = wanted.shape, wanted.stride(), wanted.dtype, wanted.device
    return lambda _: torch.empty_strided(shape, stride, dtype=dtype, device=device)


class Step(NamedTuple):
    """A forward or backward pass: a method of a native description, and the memory that it needs besides."""

    method: Callable[..., None]
    workspace_bytes: int


class PreparedCalls(ABC):
    """See `Prepared`. A subclass knows how a step is run, and whether without lse."""

    needs_lse = False
    """Whether the kernels write lse even where nobody asked for it."""

    def __init__(self, call: Any, problem: Problem, inputs: Inputs) -> None:
        results = empty_results(problem, inputs.q, for_backward=True)
        named = by_name(results)
        self.layouts: Hashable = layouts(inputs.q, inputs.k, inputs.v, *named.values())
        self._call, self._problem = call, problem
        self._forward = self._step("forward", native_inputs(problem, inputs) | named)
        lse = results.lse
        self._allocate_out = _allocator(results.out, inputs.q)
        self._lse_like = torch.empty((), dtype=lse.dtype, device=lse.device).expand(lse.shape)  # takes no memory
        self._allocate_lse = _allocator(lse, self._lse_like)
        self._keeps_low = results.out_low is not None
        self._allocate_grads: list[Allocate] = []  # made when they are first needed: growing caches never need them
        self._gradients: dict[Any, Step] = {}

    def _step(self, operation: str, tensors: Tensors) -> Step:
        call = described(self._call, self._problem, tensors)
        return Step(call.attend if operation == "forward" else call.gradients, 0)

    @abstractmethod
    def _run(self, step: Step, addresses: Sequence[int]) -> None:
        """Runs a step on q, k, v, out, lse, out_low and, backward, dout, dq, dk, dv; 0 for what there is not."""

    def infer(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Prepared.infer`."""
        out = self._allocate_out(q)
        lse = self._allocate_lse(self._lse_like) if self.needs_lse else None
        lse_address = 0 if lse is None else lse.data_ptr()
        self._run(self._forward, (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse_address, 0))
        return out

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Results:
        """See `Prepared.forward`."""
        out, lse = self._allocate_out(q), self._allocate_lse(self._lse_like)
        low = self._allocate_out(q) if self._keeps_low else None
        inputs, low_address = (q.data_ptr(), k.data_ptr(), v.data_ptr()), 0 if low is None else low.data_ptr()
        self._run(self._forward, (*inputs, out.data_ptr(), lse.data_ptr(), low_address))
        return Results(out, lse, low)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, results: Results, dout: Tensor, needs: tuple[bool, bool, bool]
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
            if len(self._gradients) >= _MOST_LAYOUTS:
                self._gradients.clear()
            tensors = {"q": q, "k": k, "v": v, **by_name(results), "dout": dout}
            tensors |= {f"d{name}": grad for name, grad in zip("qkv", grads, strict=True) if grad is not None}
            self._gradients[key] = step = self._step("backward", tensors)
        self._run(step, [0 if x is None else x.data_ptr() for x in (q, k, v, *results, dout, *grads)])
        return grads
