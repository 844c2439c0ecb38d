"""Runs the CUDA backend's kernels on CPU tensors, in a simulator of PTX: what the built module would launch.

The PTX is the module's own, taken out of it; grids, shared memory and arguments are those that its host code plans.
"""

from __future__ import annotations

import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastattn.backends.cuda import Architecture
from fastattn.backends.native import Tensors, addresses

from .simulator import ptxsim


class Simulator:
    """See `fastattn.backends.cuda.Machine`. `findings` collects races, reads of what nobody wrote and the like."""

    def __init__(self, capability: int, multiprocessors: int = 4) -> None:
        self._architecture = Architecture(capability, multiprocessors)
        self.findings: list[Any] = []
        self.kernels: list[str] = []
        self.counters: list[Any] = []

    def why_unavailable(self) -> str | None:
        return None

    def why_not(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"its tensors are on {device}, not on the CPU."

    def architecture(self, device: torch.device) -> Architecture:
        return self._architecture

    def run(self, device: torch.device, call: Any, operation: str, tensors: Tensors, seed: int) -> None:
        from fastattn import _cuda

        kind, where = getattr(_cuda.Operation, operation), addresses(tensors)
        size = call.workspace_bytes(kind, where, *self._architecture)
        workspace = torch.full((max(size, 16),), 0xFF, dtype=torch.uint8)
        memory = _Memory([*tensors.values(), workspace])
        for launch in call.plan(kind, where, seed, *self._architecture, workspace.data_ptr()):
            self.launch(launch, memory)

    def launch(self, launch: tuple[str, int, int, int, bytes], memory: _Memory) -> None:
        name, blocks, threads, shared_bytes, argument = launch
        if blocks == 0:
            return
        module = kernels(75 if self._architecture.capability < 80 else 80)[name]
        struct = ptxsim().Struct(len(argument), memory.fields(argument))
        counters = module.launch(name, (blocks,), threads, [struct], shared_bytes=shared_bytes)
        self.kernels.append(name)
        self.counters.append(counters)
        self.findings += [f for f in counters.findings if not f[0].startswith("note:")]


class _Memory:
    """The storages that kernels may touch, by address."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.arrays: list[tuple[int, int, np.ndarray]] = []
        for x in tensors:
            storage = x.untyped_storage()
            start, size = storage.data_ptr(), storage.nbytes()
            if size and all(start != known for known, _, _ in self.arrays):
                self.arrays.append((start, size, torch.empty(0, dtype=torch.uint8).set_(storage).numpy()))

    def fields(self, argument: bytes) -> dict[int, Any]:
        """A kernel's argument, with addresses turned into the simulator's pointers."""
        from fastattn import _cuda

        words = np.frombuffer(argument, np.uint64)
        fields: dict[int, Any] = {8 * i: word for i, word in enumerate(words)}
        for offset in _cuda.address_offsets():
            address = int(words[offset // 8])
            fields[offset] = np.uint64(0) if address == 0 else self.pointer(address)
        return fields

    def pointer(self, address: int) -> Any:
        for start, size, array in self.arrays:
            if start <= address < start + size:
                return ptxsim().Ptr(array, address - start)
        raise AssertionError(f"a kernel is handed the address {address:#x}, which lies in no tensor of the call")


@lru_cache
def kernels(architecture: int) -> dict[str, Any]:
    """The modules of PTX for an architecture, by the names of their kernels."""
    import triton

    from fastattn import _cuda

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [str(tools / "cuobjdump"), "-xptx", f"sm_{architecture}.ptx", _cuda.__file__],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        for file in sorted(Path(folder).glob(f"*.sm_{architecture}.ptx")):
            module = _Lazy(file.read_text())
            for name in module.names:
                found[name] = module
    return found


class _Lazy:
    """PTX that is read when a kernel of it is first launched."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.names = [line.split()[2].split("(")[0] for line in text.splitlines() if line.startswith(".visible .entry")]
        self.module: Any = None

    def launch(self, *arguments: Any, **options: Any) -> Any:
        if self.module is None:
            self.module = ptxsim().load_ptx(self.text)
        return self.module.launch(*arguments, **options)
