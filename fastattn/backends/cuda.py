"""The CUDA C++ kernels (csrc/cuda): the hot paths in half precision. What they do not compute, Triton does."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..problem import Inputs, Problem
from . import Grads, Needs, empty_lse, empty_out
from .native import (
    Tensors,
    addresses,
    as_grads,
    described,
    empty_grads,
    gradient_tensors,
    native_inputs,
    seed_of,
    written,
)

try:
    from .. import _cuda
except ImportError as error:  # built without nvcc
    _cuda = None  # type: ignore[assignment]
    _import_error = str(error)

_LONGEST = 2**28  # sums of two positions and a window stay within 32 bits
_MOST_QUERIES_WITH_CACHE = 16
_CHUNK = 8  # numbers in the 16 bytes that kernels read at once
_UNSUPPORTED = {
    "mask": "it has a mask",
    "bias": "it has a bias",
    "dropout": "it has dropout",
}
_READ_IN_CHUNKS = ("q", "k", "v", "k_new", "v_new", "dout", "out")
"""Tensors whose rows must be contiguous, and lie at multiples of 16 bytes."""


class Architecture(NamedTuple):
    """A GPU, as far as plans depend on it. capability: 10 * major + minor."""

    capability: int
    multiprocessors: int


class Machine(Protocol):
    """What runs planned calls."""

    def why_unavailable(self) -> str | None:
        """None if kernels can run here, else a sentence."""

    def why_not(self, device: torch.device) -> str | None:
        """None if kernels can run on tensors there, else a sentence."""

    def architecture(self, device: torch.device) -> Architecture:
        """The GPU of tensors there."""

    def run(self, device: torch.device, call: _cuda.Call, operation: str, tensors: Tensors, seed: int) -> None:
        """Runs an operation of `_cuda.Operation` on tensors of this device."""


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

    def architecture(self, device: torch.device) -> Architecture:
        """See `Machine`."""
        return _architecture(device)

    def run(self, device: torch.device, call: _cuda.Call, operation: str, tensors: Tensors, seed: int) -> None:
        """See `Machine`."""
        kind, where = getattr(_cuda.Operation, operation), addresses(tensors)
        workspace = torch.empty(
            call.workspace_bytes(kind, where, *_architecture(device)), dtype=torch.uint8, device=device
        )
        stream = torch.cuda.current_stream(device).cuda_stream
        index = torch.cuda.current_device() if device.index is None else device.index
        call.run(kind, where, seed, index, stream, workspace.data_ptr())


@lru_cache
def _architecture(device: torch.device) -> Architecture:
    properties = torch.cuda.get_device_properties(device)
    return Architecture(10 * properties.major + properties.minor, properties.multi_processor_count)


class CudaBackend:
    """Kernels compiled ahead for Turing and for Ampere and later."""

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
        for feature, sentence in _UNSUPPORTED.items():
            if feature in p.features:
                return f"{sentence}, which these kernels do not compute."
        for name in ("seqlen_q", "seqlen_k"):
            if getattr(p, name) >= _LONGEST:
                return f"{name} is {getattr(p, name)}, and this backend takes less than {_LONGEST}."
        for name in ("head_dim", "head_dim_v"):
            if getattr(p, name) % _CHUNK:
                return f"{name} is {getattr(p, name)}, and this backend takes multiples of {_CHUNK}."
        if p.kind == "cache":
            if p.seqlen_q > _MOST_QUERIES_WITH_CACHE:
                return (
                    f"seqlen_q is {p.seqlen_q}, and this backend takes at most {_MOST_QUERIES_WITH_CACHE} queries "
                    "with a cache."
                )
            if p.page_size % 16:
                return f"page_size is {p.page_size}, and this backend takes multiples of 16."
        return _why_not_head_dims(p, self._machine.architecture(p.device).capability)

    def remarks(self, problem: Problem, inputs: Inputs) -> list[str]:
        """See `Backend.remarks`."""
        named = {name: x for name, x in inputs._asdict().items() if x is not None and name in _READ_IN_CHUNKS}
        return [
            f"{name} is copied first, as {reason}." for name, x in named.items() if (reason := _why_not_in_chunks(x))
        ]

    def prepare(self, problem: Problem, inputs: Inputs) -> None:
        """The general way is the only one."""

    def forward(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        return self._attend("forward", problem, inputs)[:2]

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
        self._run("backward", problem, inputs, tensors)
        return as_grads(inputs, grads)

    def decode(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See `Backend.decode`."""
        out, lse, tensors = self._attend("with_cache", problem, inputs)
        written(inputs, tensors)
        return out, lse

    def _attend(self, operation: str, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensors]:
        out, lse = empty_out(problem, inputs.q), empty_lse(problem)
        tensors = {**native_inputs(problem, inputs), "out": out, "lse": lse}
        return out, lse, self._run(operation, problem, inputs, tensors)

    def _run(self, operation: str, problem: Problem, inputs: Inputs, tensors: Tensors) -> Tensors:
        """Returns the tensors that the kernels really took."""
        for name in _READ_IN_CHUNKS:
            if name in tensors and _why_not_in_chunks(tensors[name]):
                tensors[name] = tensors[name].clone(memory_format=torch.contiguous_format)
        call = described(_cuda.Call, problem, tensors)
        self._machine.run(problem.device, call, operation, tensors, seed_of(inputs))
        return tensors


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


def _why_not_head_dims(p: Problem, capability: int) -> str | None:
    """None if there are kernels for the head dimensions on a GPU, else a sentence."""
    number = f"{capability // 10}.{capability % 10}"
    largest = max(p.head_dim, p.head_dim_v)
    if capability < 75:
        return f"the GPU has compute capability {number}, and this backend needs at least 7.5."
    if capability < 80:
        return f"the GPU has compute capability {number}, and there are no kernels for it yet."
    if largest > _cuda.HEAD_DIMS[-1]:
        return f"head_dim is {largest}, and this backend takes at most {_cuda.HEAD_DIMS[-1]}."
    return None
