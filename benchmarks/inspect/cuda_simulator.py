"""Runs the kernels of the CUDA module on CPU tensors, in a simulator of PTX.

The PTX is extracted from the module. Grids, shared memory and arguments are the plans of its host code.
It needs the simulator `ptxsim` on the path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from fastattn.backends.native.call import Tensors, addresses
from fastattn.backends.native.cuda import Architecture
from fastattn.backends.native.prepared import NAMES, Step

from . import cuda_module


def ptxsim() -> Any:
    """The simulator. Raises ImportError if it is not available."""
    import ptxsim

    return ptxsim


def missing() -> str | None:
    """Why the simulator is not available. A broken simulator raises."""
    try:
        ptxsim()
    except ModuleNotFoundError as error:
        if error.name != "ptxsim":
            raise
        return f"needs the PTX simulator ptxsim, which is not here: {error}"
    return None


def named(tensors: Sequence[torch.Tensor | None], workspace: torch.Tensor | None) -> Tensors:
    """The tensors of a prepared step by name."""
    found = dict(zip(NAMES, tensors, strict=False)) | {"workspace": workspace}
    return {name: x for name, x in found.items() if x is not None}


class Simulator:
    """See `fastattn.backends.native.cuda.Machine`.

    findings: races, reads of uninitialised memory and the like.
    kernels, counters: the launched kernels, and the simulator's counters of each launch.
    shared_bytes: dynamic shared memory of each kernel.
    tensors: those of the last call.
    """

    device = "cpu"

    def __init__(self, capability: int = 80, multiprocessors: int = 16) -> None:
        self.capability, self.multiprocessors = capability, multiprocessors
        self.findings: list[Any] = []
        self.kernels: list[str] = []
        self.counters: list[Any] = []
        self.shared_bytes: dict[str, int] = {}
        self.bank_conflicts = 0

    def why_unavailable(self) -> str | None:
        """See `Machine`."""
        return None

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Machine`."""
        return None if device.type == "cpu" else f"its tensors are on {device}, not on the CPU."

    def architecture(self, device: torch.device) -> Architecture:
        """See `Machine`."""
        return Architecture(self.capability, self.multiprocessors)

    def run_step(
        self, device: torch.device, step: Step, tensors: Sequence[torch.Tensor | None], workspace: torch.Tensor | None
    ) -> None:
        """See `Machine`."""
        self.run(device, step.operation, step.call, named(tensors, workspace))

    def run(self, device: torch.device, operation: str, call: Any, tensors: Tensors) -> None:
        """See `Machine`."""
        self.tensors = tensors
        memory = Memory(tensors.values())
        plan = call.plan(operation, addresses(tensors), *self.architecture(device))
        for name, blocks, threads, shared_bytes, argument in plan:
            if blocks == 0:
                continue
            struct = ptxsim().Struct(len(argument), memory.fields(argument))
            counters = self.launch(name, (blocks,), threads, [struct], shared_bytes=shared_bytes)
            self.kernels.append(name)
            self.counters.append(counters)
            self.shared_bytes[name] = shared_bytes
            self.bank_conflicts += counters["bank_conflicts"]
            self.findings += findings(counters)

    def launch(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Runs a kernel and returns the simulator's counters."""
        return kernels(self.capability)[name].launch(name, *arguments, **options)


def findings(counters: Any) -> list[Any]:
    """The simulator's findings in a launch, except notes, which may be legitimate."""
    return [found for found in counters.findings if not found[0].startswith("note:")]


class Memory:
    """The storages that kernels may touch, by address."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.arrays: list[tuple[int, int, np.ndarray]] = []
        for x in tensors:
            storage = x.untyped_storage()
            start, size = storage.data_ptr(), storage.nbytes()
            if size and all(start != known for known, _, _ in self.arrays):
                self.arrays.append((start, size, torch.empty(0, dtype=torch.uint8).set_(storage).numpy()))

    def fields(self, argument: bytes) -> dict[int, Any]:
        """A kernel's argument, with addresses replaced by the simulator's pointers."""
        from fastattn import _cuda

        words = np.frombuffer(argument, np.uint64)
        fields: dict[int, Any] = {8 * i: word for i, word in enumerate(words)}
        for offset in _cuda.address_offsets():
            address = int(words[offset // 8])
            fields[offset] = np.uint64(0) if address == 0 else self.pointer(address)
        return fields

    def pointer(self, address: int) -> Any:
        """The simulator's pointer for an address, which must be in one of the storages."""
        for start, size, array in self.arrays:
            if start <= address < start + size:
                return ptxsim().Ptr(array, address - start)
        raise AssertionError(f"a kernel is handed the address {address:#x}, which lies in no tensor of the call")


@lru_cache
def kernels(capability: int) -> dict[str, Any]:
    """The module's PTX by kernel name, as the driver chooses it for a compute capability (times 10)."""
    units = sorted((unit for unit in _units() if unit.target <= capability), key=lambda unit: unit.target)
    return {name: unit for unit in units for name in unit.names}


def ptx(name: str, capability: int) -> str:
    """The PTX of one kernel, without the other kernels of its compilation unit."""
    head, *entries = re.split(r"(?m)^(?=\.visible \.entry )", kernels(capability)[name].text)
    (entry,) = (x for x in entries if x.split()[2].split("(")[0] == name)
    return head + entry


@lru_cache
def _units() -> list[_Lazy]:
    return [_Lazy(text) for text in cuda_module.ptx()]


class _Lazy:
    """PTX that is parsed at the first launch. target: its compute capability, times 10."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.target = int(re.findall(r"(?m)^\.target sm_(\d+)", text)[0])
        self.names = [line.split()[2].split("(")[0] for line in text.splitlines() if line.startswith(".visible .entry")]
        self.module: Any = None

    def launch(self, *arguments: Any, **options: Any) -> Any:
        if self.module is None:
            self.module = ptxsim().load_ptx(self.text)
        return self.module.launch(*arguments, **options)
