"""The CUDA C++ kernels (csrc/cuda): forward, backward and calls with a cache, in half precision."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..chunks import why_not_in_chunks
from ..problem import Inputs, Problem
from . import Grads, Needs, Results, empty_results
from .native import (
    Tensors,
    addresses,
    as_grads,
    by_name,
    described,
    empty_grads,
    gradient_tensors,
    native_inputs,
    written,
)

try:
    from .. import _cuda
except ImportError as error:  # built without nvcc
    _cuda = None  # type: ignore[assignment]
    _import_error = str(error)

_LONGEST = 2**28  # sums of two positions and a window stay within 32 bits
_CHUNK = 8  # numbers in the 16 bytes that kernels read at once
_PAGE_UNIT = 16  # keys that lie in one page


class Processor(NamedTuple):
    """What plans depend on besides the call: compute capability times 10, and streaming multiprocessors."""

    capability: int
    multiprocessors: int


class Machine(Protocol):
    """What runs planned calls."""

    def why_unavailable(self) -> str | None:
        """None if kernels can run here, else a sentence."""

    def why_not(self, device: torch.device) -> str | None:
        """None if kernels can run on tensors there, else a sentence."""

    def processor(self, device: torch.device) -> Processor:
        """The GPU of tensors there."""

    def run(self, device: torch.device, operation: str, call: _cuda.Call, tensors: Tensors) -> None:
        """Runs an operation ("forward", "backward" or "decode") of a call on tensors of this device."""


class Gpu:
    """NVIDIA GPUs, as torch presents them, on torch's current stream."""

    def why_unavailable(self) -> str | None:
        """See `Machine`."""
        if not torch.cuda.is_available() or torch.version.cuda is None:
            return "there is no NVIDIA GPU here that torch can use."
        reason = _cuda.why_unavailable()
        return f"CUDA cannot run here: {reason}." if reason else None

    def why_not(self, device: torch.device) -> str | None:
        """See `Machine`."""
        return None if device.type == "cuda" else f"its tensors are on {device}, and this backend runs on NVIDIA GPUs."

    def processor(self, device: torch.device) -> Processor:
        """See `Machine`."""
        return _processor(device)

    def run(self, device: torch.device, operation: str, call: _cuda.Call, tensors: Tensors) -> None:
        """See `Machine`."""
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = torch.cuda.current_stream(device).cuda_stream
        call.run(operation, addresses(tensors), *self.processor(device), index, stream)


@lru_cache
def _processor(device: torch.device) -> Processor:
    properties = torch.cuda.get_device_properties(device)
    return Processor(10 * properties.major + properties.minor, properties.multi_processor_count)


class CudaBackend:
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
        if reason := self._machine.why_not(p.device):
            return reason
        if p.page_size % _PAGE_UNIT:
            return f"its page size is {p.page_size}, and these kernels take multiples of {_PAGE_UNIT}."
        for feature in ("mask", "bias", "dropout"):
            if feature in p.features:
                return f"it uses {feature}, which these kernels do not compute."
        for name in ("seqlen_q", "seqlen_k"):
            if getattr(p, name) >= _LONGEST:
                return f"{name} is {getattr(p, name)}, and this backend takes less than {_LONGEST}."
        if p.kind == "cache" and (rows := p.seqlen_q * p.group) >= _LONGEST:
            return f"a key/value head has {rows} rows of queries, and this backend takes less than {_LONGEST}."
        for name in ("head_dim", "head_dim_v"):
            if getattr(p, name) % _CHUNK:
                return f"{name} is {getattr(p, name)}, and this backend takes multiples of {_CHUNK}."
        if "unaligned cache" in p.features:
            return "its cache, which is not copied, has rows that are not contiguous or not at multiples of 16 bytes."
        return _why_not_on(p, self._machine.processor(p.device).capability)

    def remarks(self, problem: Problem, inputs: Inputs) -> list[str]:
        """See `Backend.remarks`."""
        reasons = {name: why_not_in_chunks(getattr(inputs, name)) for name in _read_in_chunks(problem)}
        return [f"{name} is copied first, as {reason}." for name, reason in reasons.items() if reason]

    def prepare(self, problem: Problem, inputs: Inputs) -> None:
        """The general way is the only one."""

    def forward(self, problem: Problem, inputs: Inputs, for_backward: bool) -> Results:
        """See `Backend.forward`."""
        results = empty_results(problem, inputs.q, for_backward)
        tensors = _in_chunks(problem, native_inputs(problem, inputs)) | by_name(results)
        self._run("forward", problem, tensors)
        return results

    def _run(self, operation: str, problem: Problem, tensors: Tensors) -> None:
        call = described(_cuda.Call, problem, tensors)
        size = call.workspace_bytes(operation, addresses(tensors), *self._machine.processor(problem.device))
        if size:
            tensors = tensors | {"workspace": torch.empty(size, dtype=torch.uint8, device=problem.device)}
        self._machine.run(problem.device, operation, call, tensors)

    def backward(
        self, problem: Problem, inputs: Inputs, results: Results, dout: Tensor, dlse: Tensor | None, needs: Needs
    ) -> Grads:
        """See `Backend.backward`."""
        grads = empty_grads(problem, inputs, needs)
        tensors = gradient_tensors(native_inputs(problem, inputs), results, dout, dlse, grads)
        self._run("backward", problem, _in_chunks(problem, tensors))
        return as_grads(inputs, grads)

    def decode(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See `Backend.decode`."""
        results = empty_results(problem, inputs.q, for_backward=False)
        tensors = _in_chunks(problem, native_inputs(problem, inputs)) | by_name(results)
        self._run("decode", problem, tensors)
        written(inputs, tensors)
        return results.out, results.lse


def _read_in_chunks(problem: Problem) -> tuple[str, ...]:
    """Inputs that are copied if kernels cannot read them in chunks; a cache is written in place, and refused."""
    return ("q",) if problem.kind == "cache" else ("q", "k", "v")


def _in_chunks(problem: Problem, tensors: Tensors) -> Tensors:
    """The tensors, with copies of those that kernels cannot read in chunks as they are."""
    read = [name for name in (*_read_in_chunks(problem), "out", "out_low", "dout") if name in tensors]
    unfit = [name for name in read if why_not_in_chunks(tensors[name])]
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
        largest = _cuda.LARGEST_HEAD_DIM if capability >= 80 else _cuda.LARGEST_HEAD_DIM_75
        if getattr(p, name) > largest:
            where = "" if capability >= 80 else f" on a GPU of compute capability {number}"
            return f"{name} is {getattr(p, name)}, and this backend takes at most {largest}{where}."
    return None
