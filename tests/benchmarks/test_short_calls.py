"""The comparison of two checkouts, of this one with itself."""

from __future__ import annotations

import sys

import pytest

from benchmarks import short_calls


def test_each_call_is_timed_in_each_checkout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["short_calls", "--other", str(short_calls.HERE), "--rounds", "1"])
    short_calls.main()
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["microseconds", "other", "this", "ratio"]
    assert len(rows) == len(short_calls.CALLS)
    for row, call in zip(rows, short_calls.CALLS, strict=True):
        assert row.startswith(call)
        other, this, ratio = map(float, row.removeprefix(call).split()[:3])
        assert min(other, this) > 0
        assert ratio == pytest.approx(this / other, rel=0.01)
