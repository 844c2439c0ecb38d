"""The C++ kernels for CPUs (csrc/cpu): fused forward, backward and decoding, every feature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...problem import Inputs, Problem
from ..base import Backend, Grads, Needs, Prepared, Results, empty_results, finish_append, why_too_large
from . import why_not_imported
from .call import (
    DTYPE_CODES,
    addresses,
    as_grads,
    by_name,
    described,
    empty_grads,
    gradient_tensors,
    native_inputs,
    seed_of,
)
from .prepared import PreparedCalls, Step, addresses_of

try:
    from ... import _cpu
except ImportError as error:  # running from a source tree that was never built
    _cpu = None  # type: ignore[assignment]
    _import_error = why_not_imported("_cpu", error)

_MAX_HEAD_DIM = 2**24  # the kernels count the elements of a few rows in 32 bits


class CpuBackend(Backend):
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
        return why_too_large(problem, _MAX_HEAD_DIM)

    def prepare(self, problem: Problem, inputs: Inputs) -> Prepared | None:
        """See `Backend.prepare`."""
        if any(x.is_neg() or x._is_zerotensor() for x in inputs[:3]):
            return None
        return _CpuCalls(_cpu.Call, problem, inputs)

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
        finish_append(inputs, tensors["k"], tensors["v"])
        return results.out, results.lse


class _CpuCalls(PreparedCalls):
    def _run(self, step: Step, tensors: Sequence[Tensor | None]) -> None:
        step.method(*addresses_of(tensors), torch.get_num_threads())

    def infer(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # What the base class does, in fewer steps: they count in the shortest call of all.
        out = self._allocate_out(q)
        addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
        self._forward.method(*addresses, 0, 0, torch.get_num_threads())
        return out

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Likewise.
        results = out, lse, residual = self._allocate_results(q)
        addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), residual.data_ptr())
        self._forward.method(*addresses, torch.get_num_threads())
        return results


def instruction_set() -> str | None:
    """The instruction set that the kernels use here (see FASTATTN_CPU_ISA); None without the native module."""
    return None if _cpu is None else _cpu.instruction_set()


def multiply_adds(dtype: torch.dtype, steps: int) -> int:
    """Multiply-adds and nothing else, in the words in which the kernels multiply this dtype, on all threads.

    `steps` of 12 vectors each. Returns the floating-point operations done: the ceiling that kernels are compared with.
    """
    return _cpu.multiply_adds(DTYPE_CODES[dtype], steps, torch.get_num_threads())
