"""Faithful records: statistics, ratios and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import costs, measurements
from benchmarks.measurements import FAILED, CaseResult, Measurement, Run

from .samples import PEAKS, measured, sample_run, tiny


def test_statistics_are_what_their_names_say() -> None:
    run = sample_run()
    first = run.results[0]
    ours, sdpa = first.measurements[:2]
    assert (ours.median, ours.quartiles) == (2.0, (1.5, 3.0))
    assert measured("one", [5.0]).quartiles == (5.0, 5.0)
    # Per round 2/1, 2/2 and 12/4: the median of the ratios, not the ratio of the medians (2/2).
    assert first.ratio(sdpa) == 2.0
    assert run.geometric_means() == {
        ("tiny", "sdpa"): (pytest.approx((2.0 * 0.5 * 3.0) ** (1 / 3)), 3),
        ("tiny", "eager"): (pytest.approx((4.0 * 2.0) ** 0.5), 2),
    }
    assert [(found.case, found.rival, found.ratio) for found in run.worst(2)] == [
        (run.results[1].case, "sdpa", 0.5),
        (run.results[0].case, "sdpa", 2.0),
    ]
    assert run.failures() == []


def test_ratios_compare_with_the_first_of_ours_that_ran() -> None:
    failed = Measurement("fastattn:cpu", True, FAILED, "RuntimeError: no")
    ours, theirs = measured("fastattn:reference", [2.0], ours=True), measured("sdpa", [3.0])
    result = CaseResult(tiny(), [failed, ours, theirs])
    assert result.ratio(theirs) == 1.5
    assert Run({}, PEAKS, [result]).failures() == [(tiny(), failed)]
    assert CaseResult(tiny(), [failed, theirs]).ratio(theirs) is None


def test_a_run_survives_json(tmp_path: Path) -> None:
    run = sample_run()
    run.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == run
    document = json.loads((tmp_path / "run.json").read_text())
    first = document["results"][0]
    assert first["flops"] == costs.flops(run.results[0].case)
    assert first["bytes"] == costs.bytes_moved(run.results[0].case)
    assert first["rivals"][1]["ratio"] == 2.0
    assert first["rivals"][1]["seconds"] == [2.0, 2.0, 12.0]
    with pytest.raises(ValueError, match="expected a benchmark document of format 1, got 7"):
        Run.from_json({"format": 7})
    assert measurements.FORMAT == 1
