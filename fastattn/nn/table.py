"""Tables indexed by position that are computed once and grow on demand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .recorded import is_tracing

Compute = Callable[[Tensor, torch.dtype], Tensor]


class Table:
    """Rows `compute(positions, dtype)` for the positions 0, 1, 2, ..., kept per device and dtype.

    compute takes positions (n,) and returns (..., n, width) of that dtype. The rows are no buffers of a
    module: `module.to(torch.bfloat16)` would round those, and `to_empty` forget them. Copies leave them out.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._rows: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __reduce__(self) -> tuple[type[Table], tuple[Compute]]:
        return Table, (self._compute,)

    def rows(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The first `length` rows: (..., length, width)."""
        if torch.compiler.is_compiling() or is_tracing():
            return self._compute(torch.arange(length, device=device), dtype)
        rows = self._rows.get((device, dtype))
        if rows is None or rows.shape[-2] < length:
            rows = self._grow(length if rows is None else max(length, 2 * rows.shape[-2]), device, dtype)
        return rows if rows.shape[-2] == length else rows[..., :length, :]

    def _grow(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        # A tensor that is born in inference mode could never be part of training again.
        with torch.inference_mode(False), torch.no_grad():
            rows = self._compute(torch.arange(length, device=device), dtype)
        if type(rows) is Tensor and device.type != "meta":  # a fake tensor must not outlive its mode
            self._rows[device, dtype] = rows
        return rows


def angles(positions: Tensor, width: int, base: float) -> Tensor:
    """positions times the frequencies base^(-0/width), base^(-2/width), ...: (..., ceil(width / 2)).

    Where the device has it in float64: angles of far positions need more digits than float32 has.
    """
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    exponents = torch.arange(0, width, 2, dtype=dtype, device=positions.device) / width
    return positions.to(dtype)[..., None] * base**-exponents
