"""Strides so large that offsets within a block of rows do not fit into 32 bits; most of the memory is never touched."""

from __future__ import annotations

import pytest
import torch

import fastattn


@pytest.mark.parametrize("step", [2**26 + 64, 2**27 + 64])
def test_rows_far_apart(step: int, backend: str, device: str) -> None:
    if device != "cpu" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of GPU memory")
    q, k, v = torch.randn(3, 1, 1, 18, 64, device=device).half().unbind()
    far = torch.empty(step * 17 + 64, dtype=torch.float16, device=device).as_strided((1, 1, 18, 64), (1, 1, step, 1))
    far.copy_(k)
    found = fastattn.attention(q, far, v, backend=backend)
    torch.testing.assert_close(found, fastattn.attention(q, k, v, backend=backend))
