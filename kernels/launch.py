"""One launch of a kernel, as data."""

from __future__ import annotations

from typing import Any, NamedTuple


class Launch(NamedTuple):
    """kernel: a Triton kernel. grid: programs. arguments: by name, tensors within them. The rest are its options."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2


def run(launch: Launch) -> None:
    """Runs it on the current device, or in Triton's interpreter."""
    if launch.grid > 0:
        launch.kernel[(launch.grid,)](
            **launch.arguments,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=True,  # Triton 3.10 stops fusing by default
        )
