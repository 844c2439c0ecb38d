"""Only right results are timed, and cold copies are taken in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from torch import Tensor

from benchmarks import harness, rivals, timing
from benchmarks.cases import Case
from benchmarks.data import Data
from benchmarks.measurements import FAILED, RAN, SKIPPED, WRONG
from benchmarks.timing import Effort

from .samples import CPU, Spoiled, tiny

BRIEF = Effort(budget=0.0, min_rounds=3)


def test_cold_copies_are_taken_in_turn_over_all_rivals() -> None:
    log: list[tuple[str, int]] = []

    def prepared(name: str) -> list[rivals.Call]:
        return [lambda i=i: log.append((name, i)) for i in range(3)]  # type: ignore[misc]

    first, second = harness.in_turn([prepared("A"), prepared("B")])
    for _ in range(3):
        first()
        second()
    assert log == [("A", 0), ("B", 1), ("A", 2), ("B", 0), ("A", 1), ("B", 2)]


class Broken(rivals.Rival):
    """Raises an error that wraps another, as compilers do."""

    name = "broken"

    def forward(self, case: Case, data: Data) -> Callable[[], Tensor]:
        raise RuntimeError("compilation failed\n in line 3") from NotImplementedError("no backward here\nat all")


class Unwilling(rivals.Rival):
    name = "unwilling"

    def why_not(self, case: Case, data: Data) -> str | None:
        return "it is Sunday"

    def forward(self, case: Case, data: Data) -> Callable[[], Tensor]:
        raise AssertionError("must not be asked")


def test_only_right_results_are_timed_and_the_others_say_why() -> None:
    entrants: Sequence[rivals.Rival] = (
        rivals.Fastattn(),
        Spoiled(causal=False),
        Broken(),
        Unwilling(),
        rivals.Sdpa(),
    )
    case = tiny(causal=True)
    (result,) = harness.run_cases([case], entrants, CPU, BRIEF)
    found = {m.rival: m for m in result.measurements}
    assert {name: m.status for name, m in found.items()} == {
        "fastattn": RAN,
        "spoiled": WRONG,
        "broken": FAILED,
        "unwilling": SKIPPED,
        "sdpa": RAN,
    }
    assert [len(found[name].seconds) for name in ("fastattn", "spoiled", "broken", "sdpa")] == [3, 0, 0, 3]
    assert found["spoiled"].reason.startswith("out is off by")
    assert found["broken"].reason == "NotImplementedError: no backward here"
    assert found["unwilling"].reason == "it is Sunday"
    assert result.ratio(found["fastattn"]) == 1.0
    assert result.ratio(found["spoiled"]) is None


def test_a_cold_case_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "last_level_cache", lambda: 50_000)
    case = tiny(seqlen=1, seqlen_k=64, cold=True)
    result = harness.run_case(case, [rivals.Fastattn(), rivals.Sdpa()], CPU, BRIEF, timing.WallClock())
    assert [m.status for m in result.measurements] == [RAN, RAN]
