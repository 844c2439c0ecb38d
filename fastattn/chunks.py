"""Whether a tensor's rows can be read 16 bytes at once, as the CUDA kernels do."""

from __future__ import annotations

from torch import Tensor

CHUNK_BYTES = 16


def why_not_in_chunks(x: Tensor) -> str | None:
    """None if the last dimension's rows are contiguous and begin at multiples of 16 bytes, else why not."""
    if reason := why_not_rows_in_chunks(x):
        return reason
    begins = x.data_ptr() % CHUNK_BYTES == 0 or x.numel() == 0 or x.ndim == 0
    return None if begins else "its memory does not begin at a multiple of 16 bytes"


def why_not_rows_in_chunks(x: Tensor) -> str | None:
    """The same for memory that begins at a multiple of 16 bytes: a matter of shape and strides alone."""
    chunk, steps = CHUNK_BYTES // x.element_size(), x.stride()
    if steps[-1:] == (1,) and not any([step % chunk for step in steps[:-1]]):
        return None  # as almost all are, found out quickly
    if x.numel() == 0 or x.ndim == 0:
        return None
    if steps[-1] != 1 and x.shape[-1] > 1:
        return f"its last stride is {steps[-1]}, and kernels read rows that are contiguous"
    for size, step in zip(x.shape[:-1], steps[:-1], strict=True):
        if size > 1 and step % chunk:
            return f"one of its strides is {step}, and kernels read 16 bytes at once: a multiple of {chunk} is needed"
    return None
