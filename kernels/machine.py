"""Where kernels run: on a GPU, or in Triton's interpreter on the CPU. Importing this does not need Triton.

Both classes have the methods of `Machine` (fastattn/backends/triton/machine.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

from .config import Architecture, Config, Shape, candidates, choose
from .launch import Launch, run
from .tuning import Build, Tuner, asked_for, default_file


def machine() -> Gpu | Interpreter:
    """The interpreter if TRITON_INTERPRET is set, as when kernels are imported, else the GPUs."""
    return Interpreter() if interpreting() else Gpu()


def interpreting() -> bool:
    """True if TRITON_INTERPRET is set, which decides for the whole process how kernels run."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def compiler() -> tuple[int, int]:
    """Triton's version."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


class Gpu:
    """NVIDIA and AMD GPUs, as torch presents them."""

    def why_unavailable(self) -> str | None:
        """See `Machine`."""
        if not torch.cuda.is_available():
            return "there is no GPU here that torch can use, and Triton's interpreter is off (TRITON_INTERPRET=1)."
        return None

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Machine`."""
        if device.type == "cpu":
            return "its tensors are on the CPU, where Triton runs only in its interpreter (TRITON_INTERPRET=1)."
        if device.type != "cuda":
            return f"its tensors are on {device}, and Triton's kernels run on GPUs."
        return why_not_architecture(self.architecture(device), dtype)

    def architecture(self, device: torch.device) -> Architecture:
        """See `Machine`."""
        return _architecture(device)

    def choose(self, device: torch.device, kernel: str, shape: Shape, build: Build) -> Config:
        """See `Machine`."""
        architecture = self.architecture(device)
        if not asked_for() or torch.cuda.is_current_stream_capturing():
            return choose(kernel, shape, architecture)
        return _tuner(device).choose(kernel, shape, candidates(kernel, shape, architecture), build)

    def run(self, device: torch.device, launches: Iterable[Launch]) -> None:
        """See `Machine`."""
        with torch.cuda.device(device):
            for launch in launches:
                run(launch)


class Interpreter:
    """Triton's interpreter: NumPy, one program after the other. For tests and debugging."""

    def why_unavailable(self) -> str | None:
        """See `Machine`."""
        return None

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Machine`."""
        if device.type not in ("cpu", "cuda"):
            return f"its tensors are on {device}, and Triton's interpreter takes CPU or GPU tensors."
        if dtype == torch.bfloat16:
            return "its dtype is torch.bfloat16, which Triton's interpreter does not compute right."
        return None

    def architecture(self, device: torch.device) -> Architecture:
        """See `Machine`."""
        return Architecture("interpreter", 0, 2**31, 4, compiler())

    def choose(self, device: torch.device, kernel: str, shape: Shape, build: Build) -> Config:
        """See `Machine`."""
        return choose(kernel, shape, self.architecture(device))

    def run(self, device: torch.device, launches: Iterable[Launch]) -> None:
        """See `Machine`."""
        for launch in launches:
            run(launch)


@lru_cache
def _tuner(device: torch.device) -> Tuner:
    import triton
    from triton.testing import do_bench

    def time(launches: Sequence[Launch]) -> float:
        def all_of_them() -> None:
            for launch in launches:
                run(launch)

        with torch.cuda.device(device):
            return do_bench(all_of_them, warmup=5, rep=20, return_mode="median")

    name = f"{torch.cuda.get_device_name(device)}|Triton {triton.__version__}"
    return Tuner(name, default_file(), time)


@lru_cache
def _architecture(device: torch.device) -> Architecture:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Architecture("hip", 0, 64 * 1024, properties.multi_processor_count, compiler())
    capability = 10 * properties.major + properties.minor
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    return Architecture("cuda", capability, shared_memory, properties.multi_processor_count, compiler())


def why_not_architecture(architecture: Architecture, dtype: torch.dtype) -> str | None:
    """None if a GPU can compute in this dtype, else a sentence."""
    if architecture.vendor != "cuda":
        return None
    number = f"{architecture.capability // 10}.{architecture.capability % 10}"
    if architecture.capability < 75:
        return f"the GPU has compute capability {number}, and Triton's kernels need at least 7.5."
    if architecture.capability < 80 and dtype == torch.bfloat16:
        return f"its dtype is torch.bfloat16, which a GPU of compute capability {number} lacks; 8.0 has it."
    return None
