"""No S x S memory: peaks of the resident size, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from benchmarks import memory

pytestmark = pytest.mark.skipif(
    memory.method(torch.device("cpu")) is None, reason="this system offers no way to reset the peak resident size"
)

MEASURE = """
import sys, torch, fastattn
from benchmarks.memory import peak_bytes
seqlen, head_dim, which = int(sys.argv[1]), 64, sys.argv[2]
def attend(q, k, v):
    if which == "eager":
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        return (q @ k.transpose(-2, -1) / 8).masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return fastattn.attention(q, k, v, causal=True, window=(256, 0) if which == "window" else None, backend="cpu")
def train(n):
    q, k, v = (torch.randn(1, 2, n, head_dim, requires_grad=True) for _ in range(3))
    out = attend(q, k, v)
    return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
train(64)  # what is loaded once does not count
print(peak_bytes(lambda: train(seqlen), torch.device("cpu")))
"""


def peak(seqlen: int, which: str) -> int:
    command = [sys.executable, "-c", MEASURE, str(seqlen), which]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.slow
def test_a_tenth_of_eager() -> None:
    """Forward and backward of 2 heads of 64, causal, at 8192 tokens."""
    assert peak(8192, "causal") < peak(8192, "eager") / 10


@pytest.mark.slow
def test_linear_in_the_length() -> None:
    """Four times the tokens, at most five times the memory."""
    for which in ("window", "causal"):
        assert peak(16384, which) < 5 * peak(4096, which)
