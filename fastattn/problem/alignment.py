"""Whether kernels can read a tensor's rows 16 bytes at once, as the CUDA kernels do."""

from __future__ import annotations

from torch import Tensor

ALIGNMENT = 16
"""Bytes of one read."""


def why_not_aligned(x: Tensor) -> str | None:
    """None if rows are contiguous and begin at multiples of 16 bytes, else why not."""
    if reason := why_rows_not_aligned(x):
        return reason
    begins = x.data_ptr() % ALIGNMENT == 0 or x.numel() == 0 or x.ndim == 0
    return None if begins else "its memory does not begin at a multiple of 16 bytes"


def why_rows_not_aligned(x: Tensor) -> str | None:
    """The same for memory that begins at a multiple of 16 bytes: only shape and strides matter."""
    elements, steps = ALIGNMENT // x.element_size(), x.stride()
    if steps[-1:] == (1,) and not any([step % elements for step in steps[:-1]]):
        return None  # nearly every tensor, so this test comes first
    if x.numel() == 0 or x.ndim == 0:
        return None
    if steps[-1] != 1 and x.shape[-1] > 1:
        return f"its last stride is {steps[-1]}, and kernels read rows that are contiguous"
    for size, step in zip(x.shape[:-1], steps[:-1], strict=True):
        if size > 1 and step % elements:
            return (
                f"one of its strides is {step}, and kernels read 16 bytes at once: a multiple of {elements} is needed"
            )
    return None
