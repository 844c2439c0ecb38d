"""What the tests of CUDA kernels run on: the simulator of PTX, and the GPU where there is one.

Both note what has run. On a GPU nobody looks for races: `findings` and `bank_conflicts` stay empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks.inspect.cuda_simulator import Simulator, named
from fastattn.backends.native import cuda
from fastattn.backends.native.call import Tensors, addresses
from fastattn.backends.native.prepared import Step

from . import simulator

_without = simulator.missing()
needs_simulator = pytest.mark.skipif(_without is not None, reason=str(_without))


class Hardware(cuda.Gpu):
    """torch's current GPU. See `cuda_simulator.Simulator`; multiprocessors: what plans are made for, None = its own."""

    device = "cuda"

    def __init__(self, multiprocessors: int | None = None) -> None:
        self.multiprocessors = multiprocessors
        self.findings: list[Any] = []
        self.kernels: list[str] = []
        self.bank_conflicts = 0

    def architecture(self, device: torch.device) -> cuda.Architecture:
        its = super().architecture(device)
        return its if self.multiprocessors is None else its._replace(multiprocessors=self.multiprocessors)

    def run_step(
        self, device: torch.device, step: Step, tensors: Sequence[torch.Tensor | None], workspace: torch.Tensor | None
    ) -> None:
        its = named(tensors, workspace)
        self.tensors = its
        plan = step.call.plan(step.operation, addresses(its), *self.architecture(device))
        self.kernels += [name for name, blocks, *_ in plan if blocks > 0]
        super().run_step(device, step, tensors, workspace)

    def run(self, device: torch.device, operation: str, call: Any, tensors: Tensors) -> None:
        self.tensors = tensors
        plan = call.plan(operation, addresses(tensors), *self.architecture(device))
        self.kernels += [name for name, blocks, *_ in plan if blocks > 0]
        super().run(device, operation, call, tensors)


def parameters(capability: int) -> list[Any]:
    """The machines for the kernels of one compute capability, times 10, as parameters of a test."""
    machines = [pytest.param(lambda: Simulator(capability), marks=needs_simulator, id="simulator")]
    if torch.cuda.is_available() and _runs(capability):
        machines.append(pytest.param(Hardware, marks=pytest.mark.gpu, id="gpu"))
    return machines


def _runs(capability: int) -> bool:
    """Whether the GPU runs these kernels: those of 7.5 are for itself, those of 8.0 for all that came later."""
    major, minor = torch.cuda.get_device_capability()
    its = 10 * major + minor
    return its == 75 if capability == 75 else its >= capability
