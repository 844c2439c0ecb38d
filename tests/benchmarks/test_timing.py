"""Fair timing: interleaved rounds, repeated short calls, disturbances noticed."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import timing
from benchmarks.measurements import CaseResult, Run
from benchmarks.report.summary import summary_lines
from benchmarks.report.table import CallTable
from benchmarks.timing import Effort, interleave

from .samples import PEAKS, ScriptedClock, measured, tiny


def test_rounds_are_interleaved() -> None:
    log: list[str] = []
    calls = {name: lambda name=name: log.append(name) for name in "ABC"}
    samples = interleave(calls, ScriptedClock(), Effort(budget=0.0, min_rounds=4))
    assert "".join(log) == "ABC" + 4 * "ABC"  # the first round warms up
    assert samples == timing.Samples({name: [1.0] * 4 for name in "ABC"}, dropped=0, quiet=True)


def test_rounds_go_on_until_the_budget_is_spent_or_there_are_enough() -> None:
    calls = {"A": lambda: None}
    assert len(interleave(calls, ScriptedClock(), Effort(budget=math.inf, max_rounds=17)).seconds["A"]) == 17
    slow = timing.WallClock()
    event = iter(range(1000))
    calls = {"A": lambda: torch.randn(100_000).sum() + next(event)}
    spent = interleave(calls, slow, Effort(budget=0.05, min_rounds=1, max_rounds=10**6)).seconds["A"]
    assert 1 < len(spent) < 1000


def test_disturbed_rounds_are_dropped() -> None:
    numbers = itertools.count()
    clock = ScriptedClock(waits=[0.0, 0.0, 5.0, 5.0, 9.0, 9.0])  # rounds 2 and 4 of 5 had to wait
    clock.seconds = lambda call, repeats: float(next(numbers))  # type: ignore[method-assign]
    effort = Effort(budget=0.0, min_rounds=3, max_rounds=5)
    found = interleave({"A": lambda: None}, clock, effort._replace(budget=math.inf))
    assert found == timing.Samples({"A": [1.0, 3.0, 5.0]}, dropped=2, quiet=True)


def test_disturbed_rounds_are_kept_and_reported_where_too_few_were_quiet() -> None:
    clock = ScriptedClock(waits=[0.0, 1.0, 2.0, 2.0])
    found = interleave({"A": lambda: None}, clock, Effort(budget=0.0, min_rounds=3))
    assert found == timing.Samples({"A": [1.0] * 3}, dropped=0, quiet=False)
    table = CallTable([tiny()], ["fastattn"], PEAKS)
    result = CaseResult(tiny(), [measured("fastattn", [1.0], ours=True)], quiet=False)
    assert all(row.endswith(" ~") for row in table.rows(result))
    assert "~ 1 case disturbed" in "\n".join(summary_lines(Run({}, PEAKS, [result])))


def test_waiting_for_a_core_is_noticed() -> None:
    if not hasattr(os, "sched_setaffinity") or not Path("/proc/self/schedstat").exists():
        pytest.skip("this system does not tell how long a process waited")
    core = min(os.sched_getaffinity(0))
    pin = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    hog = subprocess.Popen([sys.executable, "-c", pin], stdout=subprocess.PIPE)
    cores = os.sched_getaffinity(0)
    try:
        assert hog.stdout is not None
        hog.stdout.readline()
        os.sched_setaffinity(0, {core})
        clock = timing.WallClock()
        before, end = clock.waited(), time.perf_counter() + 0.2
        while time.perf_counter() < end:
            pass
        assert clock.waited() - before > timing.MOST_WAITING * 0.2
    finally:
        os.sched_setaffinity(0, cores)
        hog.kill()
        hog.wait()


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = ScriptedClock(seconds=1e-4, shortest_sample=1e-3)
    interleave({"A": lambda: None}, clock, Effort(budget=0.0, min_rounds=2))
    assert clock.repeats == [1, 10, 10]


def test_the_wall_clock_gives_seconds_per_call() -> None:
    calls = []
    assert 0 < timing.WallClock().seconds(lambda: calls.append(0), 1000) < 1e-3
    assert len(calls) == 1000
