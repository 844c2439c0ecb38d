"""Interleaved timing: each round runs every rival once, so that disturbances affect all of them equally."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

Thunk = Callable[[], object]

# One thread that waits for a core delays all others at the end of a parallel region, so the limit is low.
MOST_WAITING = 0.02
"""Share of a round that the threads together may wait for a core. A round with more is disturbed."""

_THREADS = Path("/proc/self/task")


class Effort(NamedTuple):
    """How long to measure one case: about `budget` seconds, within min_rounds to max_rounds rounds.

    While fewer than min_rounds rounds were quiet, it continues for up to `patience` times the budget.
    """

    budget: float = 2.0
    min_rounds: int = 3
    max_rounds: int = 200
    patience: float = 2.0


class Samples(NamedTuple):
    """seconds: per call and rival, one sample per round. dropped: how many disturbed rounds are excluded.

    quiet: False if too few rounds were quiet, so that disturbed ones are included.
    """

    seconds: dict[str, list[float]]
    dropped: int
    quiet: bool


class Clock(Protocol):
    """Measures calls on one kind of device."""

    name: str
    shortest_sample: float  # seconds; shorter calls are repeated within one sample

    def seconds(self, call: Thunk, repeats: int) -> float:
        """Seconds per call, over `repeats` calls in a row."""

    def waited(self) -> float:
        """Seconds, summed over threads, in which this process was ready to run but had no core."""


class WallClock:
    """time.perf_counter, for the CPU."""

    name = "wall time (perf_counter)"
    shortest_sample = 1e-3

    def seconds(self, call: Thunk, repeats: int) -> float:
        """Seconds per call, over `repeats` calls in a row."""
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    def waited(self) -> float:
        """Time spent waiting in the scheduler's queues. 0 if the system does not report it."""
        return sum(_queued_nanoseconds(path) for path in _THREADS.glob("*/schedstat")) / 1e9


def _queued_nanoseconds(path: Path) -> int:
    try:
        return int(path.read_text().split()[1])
    except OSError:  # the thread has ended since it was listed
        return 0


class CudaClock:
    """CUDA events around each call. Before the call, the L2 cache is filled with other data.

    The fill takes about 0.2 ms, during which the host launches the call. The samples therefore exclude the launch,
    except the part beyond 0.2 ms.
    """

    name = "CUDA events, L2 flushed before each call"
    shortest_sample = 0.0

    def __init__(self, device: torch.device) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(2 * cache_bytes, 2**29), dtype=torch.uint8, device=device)

    def seconds(self, call: Thunk, repeats: int) -> float:
        """Seconds per call, over `repeats` calls with a flush before each."""
        total = 0.0
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            total += start.elapsed_time(end) / 1e3
        return total / repeats

    def waited(self) -> float:
        """0: the events exclude the work of the host."""
        return 0.0


def clock_for(device: torch.device) -> Clock:
    """The clock for calls on that device."""
    return CudaClock(device) if device.type == "cuda" else WallClock()


class _Round(NamedTuple):
    seconds: dict[str, float]
    quiet: bool


def interleave(calls: Mapping[str, Thunk], clock: Clock, effort: Effort) -> Samples:
    """Samples in rounds A B C, A B C, ... until the effort is spent. Disturbed rounds are dropped.

    The first round does not count. It warms up and determines how often a short call must be repeated.
    """
    repeats = {name: _repeats(clock.seconds(call, 1), clock) for name, call in calls.items()}
    rounds: list[_Round] = []
    start = time.perf_counter()
    while not _enough(rounds, time.perf_counter() - start, effort):
        rounds.append(_round(calls, repeats, clock))
    quiet = [one for one in rounds if one.quiet]
    kept = quiet if len(quiet) >= effort.min_rounds else rounds
    seconds = {name: [one.seconds[name] for one in kept] for name in calls}
    return Samples(seconds, dropped=len(rounds) - len(kept), quiet=kept is quiet)


def _round(calls: Mapping[str, Thunk], repeats: Mapping[str, int], clock: Clock) -> _Round:
    waited, start = clock.waited(), time.perf_counter()
    seconds = {name: clock.seconds(call, repeats[name]) for name, call in calls.items()}
    elapsed = time.perf_counter() - start
    return _Round(seconds, quiet=clock.waited() - waited <= MOST_WAITING * elapsed)


def _enough(rounds: Sequence[_Round], elapsed: float, effort: Effort) -> bool:
    if len(rounds) < effort.min_rounds or len(rounds) >= effort.max_rounds:
        return len(rounds) >= effort.max_rounds
    enough_quiet = sum(one.quiet for one in rounds) >= effort.min_rounds
    return elapsed >= effort.budget * (1.0 if enough_quiet else effort.patience)


def _repeats(seconds: float, clock: Clock) -> int:
    return max(1, min(1000, math.ceil(clock.shortest_sample / max(seconds, 1e-9))))
