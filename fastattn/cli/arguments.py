"""Values that several command lines read."""

from __future__ import annotations

import torch


def parse_device(name: str) -> torch.device:
    """The device that --device names. Raises ValueError with a sentence if it is of another kind or not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name} does not exist: torch sees {torch.cuda.device_count()} CUDA devices")
    return device
