"""Runs the Triton backend's kernels as compiled for a GPU, on CPU tensors, in a simulator of PTX."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.inspect.compile_report import ARCHITECTURES
from benchmarks.inspect.cuda_simulator import missing, ptxsim
from fastattn.kernels.ahead import compile_ahead, leaves, target
from fastattn.kernels.config import Architecture, Config, Shape, choose
from fastattn.kernels.launch import Launch

__all__ = ["Simulator", "missing", "ptxsim"]

sys.path.append(str(Path(__file__).resolve().parents[3] / "shared"))


class Simulator:
    """See `fastattn.backends.triton.machine`. `findings` collects races, reads of what nobody wrote and the like."""

    def __init__(self, capability: int, multiprocessors: int = 4) -> None:
        self.capability, self.multiprocessors = capability, multiprocessors
        self.findings: list[Any] = []
        self.kernels: list[str] = []

    def why_unavailable(self) -> str | None:
        return None

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cpu" else f"its tensors are on {device}, not on the CPU."

    def architecture(self, device: torch.device) -> Architecture:
        return ARCHITECTURES[f"sm_{self.capability}"]._replace(multiprocessors=self.multiprocessors)

    def choose(self, device: torch.device, kernel: str, shape: Shape, build: object) -> Config:
        return choose(kernel, shape, self.architecture(device))

    def run(self, device: torch.device, launches: Iterable[Launch]) -> None:
        for launch in launches:
            if launch.grid > 0:
                self.launch(launch)

    def launch(self, launch: Launch) -> Any:
        """Runs a kernel; returns the simulator's counters."""
        sim = ptxsim()
        device = target("cuda", self.capability)
        compiled = compile_ahead(launch, device)
        module = sim.load_ptx(compiled.asm["ptx"])
        name = module.find(compiled.metadata.name)
        memory: dict[int, np.ndarray] = {}
        maps = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        arguments = [x for value in leaves(launch, device) for x in _arguments(sim, value, memory, maps)]
        hidden = len(module.params(name)) - len(arguments)
        scratch = [np.zeros(16, "u1") for _ in range(hidden)]
        counters = module.launch(
            name,
            (launch.grid,),
            32 * launch.num_warps,
            [*arguments, *scratch],
            shared_bytes=compiled.metadata.shared,
        )
        self.kernels.append(launch.kernel.__name__)
        self.findings += [f for f in counters.findings if not f[0].startswith("note:")]
        return counters


def _arguments(sim: Any, value: Any, memory: dict[int, np.ndarray], maps: Iterator[dict[str, Any]]) -> list[Any]:
    if not isinstance(value, TensorDescriptor):
        return [_argument(sim, value, memory)]
    x, made = value.base, next(maps)
    array = x.view(torch.int16).numpy().view(np.uint16)
    swizzle = {0: 0, 1: 32, 2: 64, 3: 128}[made["swizzle"]]
    return [sim.TensorMap(array, box=list(made["block_size"])[::-1], swizzle=swizzle), *x.shape, *x.stride()]


def _argument(sim: Any, value: Any, memory: dict[int, np.ndarray]) -> Any:
    if isinstance(value, torch.Tensor):
        return _pointer(sim, value, memory)
    if isinstance(value, float):
        return np.float32(value)
    return np.int32(value) if -(2**31) <= value < 2**31 else np.int64(value)


def _pointer(sim: Any, x: torch.Tensor, memory: dict[int, np.ndarray]) -> Any:
    """Where a tensor's values begin in its storage, of which every view is one array."""
    storage = x.untyped_storage()
    address = storage.data_ptr()
    if address == 0 or storage.nbytes() == 0:
        return sim.Ptr(memory.setdefault(0, np.zeros(16, "u1")), 0)
    if address not in memory:
        memory[address] = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return sim.Ptr(memory[address], x.storage_offset() * x.element_size())
