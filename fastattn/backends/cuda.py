"""The CUDA C++ kernels (csrc/cuda): forward and backward passes in half precision.

Calls with a cache are not there yet, so `dispatch.BACKENDS` leaves this backend out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..problem import Inputs, Problem
from . import Grads, Needs, empty_lse, empty_out
from .native import Tensors, addresses, as_grads, described, empty_grads, gradient_tensors, native_inputs

try:
    from .. import _cuda
except ImportError as error:  # built without nvcc
    _cuda = None  # type: ignore[assignment]
    _import_error = str(error)

_LONGEST = 2**28  # sums of two positions and a window stay within 32 bits
_CHUNK = 8  # numbers in the 16 bytes that kernels read at once
_READ_IN_CHUNKS = ("q", "k", "v", "out", "dout")
"""Tensors whose rows must be contiguous, and lie at multiples of 16 bytes."""


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
        """Runs an operation ("forward" or "backward") of a call on tensors of this device."""


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
        call.run(operation, addresses(tensors), *_processor(device), index, stream)


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
        if p.kind == "cache":
            return "it is a call with a cache, which these kernels do not compute."
        for feature in ("mask", "bias", "dropout"):
            if feature in p.features:
                return f"it uses {feature}, which these kernels do not compute."
        for name in ("seqlen_q", "seqlen_k"):
            if getattr(p, name) >= _LONGEST:
                return f"{name} is {getattr(p, name)}, and this backend takes less than {_LONGEST}."
        for name in ("head_dim", "head_dim_v"):
            if getattr(p, name) % _CHUNK:
                return f"{name} is {getattr(p, name)}, and this backend takes multiples of {_CHUNK}."
        return _why_not_on(p, self._machine.processor(p.device).capability)

    def remarks(self, problem: Problem, inputs: Inputs) -> list[str]:
        """See `Backend.remarks`."""
        reasons = {name: _why_not_in_chunks(x) for name, x in zip("qkv", (inputs.q, inputs.k, inputs.v), strict=True)}
        return [f"{name} is copied first, as {reason}." for name, reason in reasons.items() if reason]

    def prepare(self, problem: Problem, inputs: Inputs) -> None:
        """The general way is the only one."""

    def forward(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        out, lse = empty_out(problem, inputs.q), empty_lse(problem)
        tensors = _in_chunks(native_inputs(problem, inputs)) | {"out": out, "lse": lse}
        self._run("forward", problem, tensors)
        return out, lse

    def _run(self, operation: str, problem: Problem, tensors: Tensors) -> None:
        call = described(_cuda.Call, problem, tensors)
        size = call.workspace_bytes(operation, *self._machine.processor(problem.device))
        if size:
            tensors = tensors | {"workspace": torch.empty(size, dtype=torch.uint8, device=problem.device)}
        self._machine.run(problem.device, operation, call, tensors)

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        needs: Needs,
    ) -> Grads:
        """See `Backend.backward`."""
        grads = empty_grads(problem, inputs, needs)
        tensors = gradient_tensors(native_inputs(problem, inputs), out, lse, dout, dlse, grads)
        self._run("backward", problem, _in_chunks(tensors))
        return as_grads(inputs, grads)

    def decode(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Raises NotImplementedError; `why_not` refuses such calls."""
        raise NotImplementedError("the backend 'cuda' computes no calls with a cache")


def _in_chunks(tensors: Tensors) -> Tensors:
    """The tensors, with copies of those that kernels cannot read as they are."""
    copies = {
        name: tensors[name].clone(memory_format=torch.contiguous_format)
        for name in _READ_IN_CHUNKS
        if name in tensors and _why_not_in_chunks(tensors[name])
    }
    return tensors | copies


def _why_not_in_chunks(x: Tensor) -> str | None:
    """None if kernels can read a tensor's rows in chunks of 16 bytes, else why not."""
    if x.numel() == 0:
        return None
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return f"its last stride is {x.stride(-1)}, and kernels read rows that are contiguous"
    for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size > 1 and step % _CHUNK:
            return f"one of its strides is {step}, and kernels read 16 bytes at once: a multiple of {_CHUNK} is needed"
    if x.data_ptr() % 16:
        return "its memory does not begin at a multiple of 16 bytes"
    return None


def _why_not_on(p: Problem, capability: int) -> str | None:
    """None if there are kernels for the dtype and the head dimensions on a GPU, else a sentence."""
    number = f"{capability // 10}.{capability % 10}"
    if capability < 75:
        return f"the GPU has compute capability {number}, and this backend needs at least 7.5."
    if capability < 80 and p.dtype != torch.float16:
        return f"its dtype is {p.dtype}, and on a GPU of compute capability {number} this backend takes torch.float16."
    for name in ("head_dim", "head_dim_v"):
        largest = _cuda.LARGEST_HEAD_DIM if capability >= 80 else _cuda.LARGEST_HEAD_DIM_75
        if getattr(p, name) > largest:
            where = "" if capability >= 80 else f" on a GPU of compute capability {number}"
            return f"{name} is {getattr(p, name)}, and this backend takes at most {largest}{where}."
    return None
