"""What the Triton backend asks of the device that its kernels run on; kernels/machine.py has the devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from ...kernels.config import Architecture, Config, Shape
from ...kernels.launch import Launch
from ...kernels.tuning import Build
from .. import base


class Machine(base.Machine[Architecture], Protocol):
    """What chooses configurations and runs launches."""

    def choose(self, device: torch.device, kernel: str, shape: Shape, build: Build) -> Config:
        """The configuration of a kernel; `build` makes launches of one, for machines that time them."""

    def run(self, device: torch.device, launches: Iterable[Launch]) -> None:
        """Runs launches one after the other on tensors of this device."""
