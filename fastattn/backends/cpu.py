"""The C++ kernels for CPUs (csrc/cpu): fused forward, backward and decoding, every feature."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..layouts import layouts
from ..problem import Inputs, Problem
from . import Grads, Needs, Results, empty_grad, empty_results
from .native import (
    DTYPE_CODES,
    addresses,
    as_grads,
    by_name,
    described,
    empty_grads,
    gradient_tensors,
    in_memory,
    native_inputs,
    seed_of,
    written,
)

try:
    from .. import _cpu
except ImportError as error:  # running from a source tree that was never built
    _cpu = None  # type: ignore[assignment]
    _import_error = str(error)

_MOST_LAYOUTS = 64  # of output gradients whose calls a prepared kind keeps
_LARGEST_HEAD_DIM = 2**24  # the kernels count the elements of a few rows in 32 bits


class CpuBackend:
    """Fused kernels, compiled for several instruction sets and chosen by the processor at hand."""

    name = "cpu"

    def why_unavailable(self) -> str | None:
        """Raises ValueError if FASTATTN_CPU_ISA names an instruction set that this processor lacks."""
        if _cpu is None:
            return (
                f"the native module fastattn._cpu could not be imported ({_import_error}); build it with pip install ."
            )
        _cpu.instruction_set()
        return None

    def why_not(self, problem: Problem) -> str | None:
        """It computes every call on CPU tensors, up to a head_dim that no memory would hold rows of."""
        if problem.device.type != "cpu":
            return f"its tensors are on {problem.device}, and this backend runs on the CPU."
        for name in ("head_dim", "head_dim_v"):
            if getattr(problem, name) > _LARGEST_HEAD_DIM:
                return f"{name} is {getattr(problem, name)}, and this backend takes at most {_LARGEST_HEAD_DIM}."
        return None

    def remarks(self, problem: Problem, inputs: Inputs) -> tuple[str, ...]:
        """See `Backend.remarks`; any layout will do."""
        return ()

    def prepare(self, problem: Problem, inputs: Inputs) -> _PreparedCalls | None:
        """See `Backend.prepare`."""
        if any(x.is_neg() or x._is_zerotensor() for x in inputs[:3]):
            return None
        return _PreparedCalls(problem, inputs)

    def forward(self, problem: Problem, inputs: Inputs, for_backward: bool) -> Results:
        """See `Backend.forward`."""
        results = empty_results(problem, inputs.q, for_backward)
        tensors = native_inputs(problem, inputs) | by_name(results)
        described(_cpu.Call, problem, tensors).forward(addresses(tensors), seed_of(inputs), torch.get_num_threads())
        return results

    def backward(
        self, problem: Problem, inputs: Inputs, results: Results, dout: Tensor, dlse: Tensor | None, needs: Needs
    ) -> Grads:
        """See `Backend.backward`."""
        grads = empty_grads(problem, inputs, needs)
        tensors = gradient_tensors(native_inputs(problem, inputs), results, dout, dlse, grads)
        described(_cpu.Call, problem, tensors).backward(addresses(tensors), seed_of(inputs), torch.get_num_threads())
        return as_grads(inputs, grads)

    def decode(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See `Backend.decode`."""
        results = empty_results(problem, inputs.q, for_backward=False)
        tensors = native_inputs(problem, inputs) | by_name(results)
        described(_cpu.Call, problem, tensors).forward_with_cache(addresses(tensors), 0, torch.get_num_threads())
        written(inputs, tensors)
        return results.out, results.lse


Allocate = Callable[[Tensor], Tensor]


def _allocator(wanted: Tensor, like: Tensor) -> Allocate:
    """The quickest way to memory laid out as `wanted`, given a tensor laid out as `like`; torch.empty is slower."""
    if torch.empty_like(like, device="meta").stride() == wanted.stride() and like.shape == wanted.shape:
        return torch.empty_like
    shape, stride, dtype, device = wanted.shape, wanted.stride(), wanted.dtype, wanted.device
    return lambda _: torch.empty_strided(shape, stride, dtype=dtype, device=device)


class _PreparedCalls:
    """See `Prepared`."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        results = empty_results(problem, inputs.q, for_backward=True)
        named = by_name(results)
        self.layouts: Hashable = layouts(inputs.q, inputs.k, inputs.v, *named.values())
        self._problem = problem
        self._attend = described(_cpu.Call, problem, native_inputs(problem, inputs) | named).attend
        lse = results.lse
        self._allocate_out = _allocator(results.out, inputs.q)
        self._lse_like = torch.empty((), dtype=lse.dtype, device=lse.device).expand(lse.shape)  # takes no memory
        self._allocate_lse = _allocator(lse, self._lse_like)
        self._keeps_low = results.out_low is not None
        self._allocate_grads: list[Allocate] = []  # made when they are first needed: growing caches never need them
        self._gradients: dict[Any, Callable[..., None]] = {}

    def infer(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self._allocate_out(q)
        self._attend(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0, 0, torch.get_num_threads())
        return out

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Results:
        out, lse = self._allocate_out(q), self._allocate_lse(self._lse_like)
        low = self._allocate_out(q) if self._keeps_low else None
        inputs, low_address = (q.data_ptr(), k.data_ptr(), v.data_ptr()), 0 if low is None else low.data_ptr()
        self._attend(*inputs, out.data_ptr(), lse.data_ptr(), low_address, torch.get_num_threads())
        return Results(out, lse, low)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, results: Results, dout: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        dout = in_memory(dout)
        if not self._allocate_grads:
            self._allocate_grads = [_allocator(empty_grad(x), x) for x in (q, k, v)]
        wanted = zip(needs, self._allocate_grads, (q, k, v), strict=True)
        grads = tuple([allocate(x) if need else None for need, allocate, x in wanted])
        key = (dout.stride(), needs)
        run = self._gradients.get(key)  # once: another thread may clear it meanwhile
        if run is None:
            if len(self._gradients) >= _MOST_LAYOUTS:
                self._gradients.clear()
            tensors = {"q": q, "k": k, "v": v, **by_name(results), "dout": dout}
            tensors |= {f"d{name}": grad for name, grad in zip("qkv", grads, strict=True) if grad is not None}
            made: Callable[..., None] = described(_cpu.Call, self._problem, tensors).gradients
            self._gradients[key] = run = made
        addresses = [0 if x is None else x.data_ptr() for x in (q, k, v, *results, dout, *grads)]
        run(*addresses, torch.get_num_threads())
        return grads


def instruction_set() -> str | None:
    """The instruction set that the kernels use here (see FASTATTN_CPU_ISA); None without the native module."""
    return None if _cpu is None else _cpu.instruction_set()


def multiply_adds(dtype: torch.dtype, steps: int) -> int:
    """Multiply-adds and nothing else, in the words in which the kernels multiply this dtype, on all threads.

    `steps` of 12 vectors each. Returns the floating-point operations done: the ceiling that kernels are compared with.
    """
    return _cpu.multiply_adds(DTYPE_CODES[dtype], steps, torch.get_num_threads())
