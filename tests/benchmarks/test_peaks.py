"""The machine's measured ceilings."""

from __future__ import annotations

import pytest

from benchmarks import machine, peaks

from .samples import CPU, PEAKS, ScriptedClock


def test_peaks_are_measured_for_the_dtypes_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = peaks.measure_peaks(CPU, ["bfloat16"], runs=1, matmul_size=128)
    assert set(found.flops) == {"bfloat16", "float32"}
    assert min(*found.flops.values(), found.read_bandwidth, found.copy_bandwidth) > 1e8
    assert set(found.multiply_adds) == {"bfloat16", "float32"}
    assert found.flops_ceiling("float32") == found.multiply_adds["float32"] > 1e8
    assert found.buffer_bytes >= 4 * (machine.last_level_cache() or 0)
    busy = ScriptedClock(waits=range(99))
    monkeypatch.setattr(peaks, "clock_for", lambda _: busy)
    assert not peaks.measure_peaks(CPU, [], runs=1, matmul_size=128).quiet
    assert PEAKS.flops_ceiling("float16") == 2e11
    assert PEAKS.flops_ceiling("bfloat16") == 4e11
