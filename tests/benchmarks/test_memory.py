"""Peak memory is that of the call, or not given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import memory

from .samples import CPU


def test_peak_memory_is_that_of_the_call() -> None:
    if memory.method(CPU) is None:
        pytest.skip("this system has no way to reset the peak")

    def call() -> Tensor:
        scratch = torch.ones(2**24)  # 64 MiB, freed before the call ends
        return scratch.sum()

    for _ in range(2):  # what the first run freed counts again in the second
        peak = memory.peak_bytes(call, CPU)
        assert peak is not None
        assert 63 * 2**20 <= peak <= 80 * 2**20
    nothing = memory.peak_bytes(lambda: None, CPU)
    assert nothing is not None
    assert nothing < 2**20


def test_memory_is_not_made_up_where_it_cannot_be_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert memory.method(CPU) is None
    assert memory.peak_bytes(lambda: None, CPU) is None
