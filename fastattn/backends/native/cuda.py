"""The CUDA C++ kernels (csrc/cuda): forward, backward and calls with a cache, in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...problem import Inputs, Problem
from ...problem.alignment import ALIGNMENT, why_not_aligned, why_rows_not_aligned
from .. import base
from ..base import (
    MAX_SEQLEN,
    Backend,
    Grads,
    Needs,
    Preference,
    Prepared,
    Results,
    empty_results,
    finish_append,
    why_too_long,
)
from . import why_not_imported
from .call import Tensors, addresses, as_grads, by_name, described, empty_grads, gradient_tensors, native_inputs
from .prepared import PreparedCalls, Step, addresses_of

try:
    from ... import _cuda
except ImportError as error:  # built without nvcc
    _cuda = None  # type: ignore[assignment]
    _import_error = why_not_imported("_cuda", error)

_TRITON_IS_FASTER = 2**36  # multiply-adds, some 0.4 ms on an H100
_ALIGNED_ELEMENTS = 8  # in the 16 bytes that kernels read at once
_PAGE_UNIT = 16  # keys that lie in one page


class Architecture(NamedTuple):
    """What plans depend on beside the call: compute capability times 10, and streaming multiprocessors."""

    capability: int
    multiprocessors: int


class Machine(base.Machine[Architecture], Protocol):
    """What runs planned calls."""

    def run(self, device: torch.device, operation: str, call: _cuda.Call, tensors: Tensors) -> None:
        """Runs an operation ("forward", "backward" or "decode") of a call on tensors of this device."""

    def run_step(
        self, device: torch.device, step: Step, tensors: Sequence[Tensor | None], workspace: Tensor | None
    ) -> None:
        """The same for calls that have been prepared: tensors in the order of `prepared.NAMES`."""


class Gpu:
    """NVIDIA GPUs, as torch presents them, on torch's current stream."""

    def why_unavailable(self) -> str | None:
        """See `Machine`."""
        if not torch.cuda.is_available() or torch.version.cuda is None:
            return "there is no NVIDIA GPU here that torch can use."
        reason = _cuda.why_unavailable()
        return f"CUDA cannot run here: {reason}." if reason else None

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Machine`."""
        return None if device.type == "cuda" else f"its tensors are on {device}, and this backend runs on NVIDIA GPUs."

    def architecture(self, device: torch.device) -> Architecture:
        """See `Machine`."""
        return _architecture(device)

    def run(self, device: torch.device, operation: str, call: _cuda.Call, tensors: Tensors) -> None:
        """See `Machine`."""
        call.run(operation, addresses(tensors), *self.architecture(device), *_stream(device))

    def run_step(
        self, device: torch.device, step: Step, tensors: Sequence[Tensor | None], workspace: Tensor | None
    ) -> None:
        """See `Machine`."""
        step.method(*addresses_of((*tensors, workspace)), *self.architecture(device), *_stream(device))


def _stream(device: torch.device) -> tuple[int, int]:
    """The number of a device, and its current stream."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


@lru_cache
def _architecture(device: torch.device) -> Architecture:
    properties = torch.cuda.get_device_properties(device)
    return Architecture(10 * properties.major + properties.minor, properties.multi_processor_count)


class CudaBackend(Backend):
    """Kernels compiled ahead, for compute capability 7.5 and up."""

    name = "cuda"

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def why_unavailable(self) -> str | None:
        """See `Backend.why_unavailable`."""
        if _cuda is None:
            return (
                f"the CUDA backend was not built ({_import_error}): it needs nvcc when fastattn is installed, "
                "see the README."
            )
        return self._machine.why_unavailable()

    def why_not(self, problem: Problem) -> str | None:
        """See `Backend.why_not`."""
        p = problem
        if p.dtype not in (torch.float16, torch.bfloat16):
            return f"its dtype is {p.dtype}, and these kernels compute in torch.float16 and torch.bfloat16."
        if reason := self._machine.why_not(p.device, p.dtype):
            return reason
        if p.page_size % _PAGE_UNIT:
            return f"its page size is {p.page_size}, and these kernels take multiples of {_PAGE_UNIT}."
        for feature in ("mask", "bias", "dropout"):
            if feature in p.features:
                return f"it uses {feature}, which these kernels do not compute."
        if reason := why_too_long(p):
            return reason
        if p.kind == "cache" and (rows := p.seqlen_q * p.group) >= MAX_SEQLEN:
            return f"a key/value head has {rows} rows of queries, and this backend takes less than {MAX_SEQLEN}."
        for name in ("head_dim", "head_dim_v"):
            if getattr(p, name) % _ALIGNED_ELEMENTS:
                return f"{name} is {getattr(p, name)}, and this backend takes multiples of {_ALIGNED_ELEMENTS}."
        if "unaligned cache" in p.features:
            return "its cache, which is not copied, has rows that are not contiguous or not at multiples of 16 bytes."
        return _why_not_on(p, self._machine.architecture(p.device).capability)

    def preference(self, problem: Problem) -> Preference:
        """On Hopper, Triton's kernels are faster for large calls that are like those that were measured.

        They use Hopper's own instructions. Launching them takes the host longer, so small calls stay here.
        """
        p = problem
        if p.features - {"dense", "causal"} or p.seqlen_q != p.seqlen_k or max(p.head_dim, p.head_dim_v) > 128:
            return Preference.NORMAL
        if p.device.type != "cuda" or self.why_unavailable() is not None:
            return Preference.NORMAL
        pairs = p.batch * p.heads_q * p.seqlen_q * p.seqlen_k // (2 if "causal" in p.features else 1)
        if pairs * (p.head_dim + p.head_dim_v) < _TRITON_IS_FASTER:
            return Preference.NORMAL
        is_hopper = self._machine.architecture(p.device).capability // 10 == 9
        return Preference.SLOWER if is_hopper else Preference.NORMAL

    def notes(self, problem: Problem, inputs: Inputs) -> list[str]:
        """See `Backend.notes`."""
        reasons = {name: why_not_aligned(getattr(inputs, name)) for name in _read_aligned(problem)}
        return [f"{name} is copied first, as {reason}." for name, reason in reasons.items() if reason]

    def prepare(self, problem: Problem, inputs: Inputs) -> Prepared | None:
        """See `Backend.prepare`."""
        if any(x.is_neg() or x._is_zerotensor() or why_rows_not_aligned(x) for x in inputs[:3]):
            return None
        return _CudaCalls(self, self._machine, problem, inputs)

    def forward(self, problem: Problem, inputs: Inputs, for_backward: bool) -> Results:
        """See `Backend.forward`."""
        results = empty_results(problem, inputs.q, for_backward)
        tensors = _aligned(problem, native_inputs(problem, inputs)) | by_name(results)
        self._run("forward", problem, tensors)
        return results

    def _run(self, operation: str, problem: Problem, tensors: Tensors) -> None:
        call = described(_cuda.Call, problem, tensors)
        size = _workspace_bytes(call, operation, tuple(tensors), self._machine.architecture(problem.device))
        if size:
            tensors = tensors | {"workspace": torch.empty(size, dtype=torch.uint8, device=problem.device)}
        self._machine.run(problem.device, operation, call, tensors)

    def backward(
        self, problem: Problem, inputs: Inputs, results: Results, dout: Tensor, dlse: Tensor | None, needs: Needs
    ) -> Grads:
        """See `Backend.backward`."""
        grads = empty_grads(problem, inputs, needs)
        tensors = gradient_tensors(native_inputs(problem, inputs), results, dout, dlse, grads)
        self._run("backward", problem, _aligned(problem, tensors))
        return as_grads(inputs, grads)

    def decode(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See `Backend.decode`."""
        results = empty_results(problem, inputs.q, for_backward=False)
        tensors = _aligned(problem, native_inputs(problem, inputs)) | by_name(results)
        self._run("decode", problem, tensors)
        finish_append(inputs, tensors["k"], tensors["v"])
        return results.out, results.lse


class _CudaCalls(PreparedCalls):
    """What does not begin at a multiple of 16 bytes goes the backend's general way, where it is copied."""

    needs_lse = True

    def __init__(self, backend: CudaBackend, machine: Machine, problem: Problem, inputs: Inputs) -> None:
        self._backend, self._machine = backend, machine
        super().__init__(_cuda.Call, problem, inputs)

    def _workspace_bytes(self, operation: str, call: _cuda.Call, tensors: Tensors) -> int:
        return _workspace_bytes(call, operation, tuple(tensors), self._machine.architecture(self._problem.device))

    def _run(self, step: Step, tensors: Sequence[Tensor | None]) -> None:
        device, size = self._problem.device, step.workspace_bytes
        workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
        self._machine.run_step(device, step, tensors, workspace)

    def infer(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not _begin_aligned(q, k, v):
            return self._backend.forward(self._problem, Inputs(q, k, v), for_backward=False).out
        return super().infer(q, k, v)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not _begin_aligned(q, k, v):
            out, lse, residual = self._backend.forward(self._problem, Inputs(q, k, v), for_backward=True)
            assert residual is not None
            return out, lse, residual
        return super().forward(q, k, v)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, results: Sequence[Tensor], dout: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        out, _, residual = results
        if not _begin_aligned(q, k, v, out, residual) or why_not_aligned(dout):
            inputs, wanted = Inputs(q, k, v), Needs(*needs, False, False)
            return self._backend.backward(self._problem, inputs, Results(*results), dout, None, wanted)[:3]
        return super().backward(q, k, v, results, dout, needs)


@lru_cache(maxsize=4096)
def _workspace_bytes(call: _cuda.Call, operation: str, names: tuple[str, ...], architecture: Architecture) -> int:
    """The memory that an operation needs beside its tensors.

    That depends on sizes and on which tensors are given, not on where they lie: a call is planned when it runs, once.
    """
    anywhere = dict.fromkeys(names, ALIGNMENT)
    return call.workspace_bytes(operation, anywhere, *architecture)


def _begin_aligned(*tensors: Tensor) -> bool:
    return not any([x.data_ptr() % ALIGNMENT for x in tensors])


def _read_aligned(problem: Problem) -> tuple[str, ...]:
    """Inputs that are copied if they are not aligned; a cache is written in place, and refused."""
    return ("q",) if problem.kind == "cache" else ("q", "k", "v")


def _aligned(problem: Problem, tensors: Tensors) -> Tensors:
    """The tensors, with copies of those that kernels cannot read as they are."""
    read = [name for name in (*_read_aligned(problem), "out", "residual", "dout") if name in tensors]
    unfit = [name for name in read if why_not_aligned(tensors[name])]
    return tensors | {name: tensors[name].clone(memory_format=torch.contiguous_format) for name in unfit}


def _why_not_on(p: Problem, capability: int) -> str | None:
    """None if there are kernels for the dtype and the head dimensions on a GPU, else a sentence."""
    number = f"{capability // 10}.{capability % 10}"
    if capability < 75:
        return f"the GPU has compute capability {number}, and this backend needs at least 7.5."
    if capability < 80 and p.kind == "cache":
        return (
            f"it is a call with a cache, which on a GPU of compute capability {number} this backend does not compute."
        )
    if capability < 80 and p.dtype != torch.float16:
        return f"its dtype is {p.dtype}, and on a GPU of compute capability {number} this backend takes torch.float16."
    for name in ("head_dim", "head_dim_v"):
        largest = _cuda.max_head_dim(capability)
        if getattr(p, name) > largest:
            where = "" if capability >= 80 else f" on a GPU of compute capability {number}"
            return f"{name} is {getattr(p, name)}, and this backend takes at most {largest}{where}."
    return None
