"""Runs cases: correctness first, then interleaved timing, then memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple

import torch

from .cases import Case
from .data import Data, make_cold_data, make_data
from .gate import Expected, check, expect
from .machine import last_level_cache
from .measurements import FAILED, RAN, SKIPPED, WRONG, C, CaseResult, Measurement
from .memory import peak_bytes
from .rivals import Call, Rival
from .timing import Clock, Effort, clock_for, interleave

logger = logging.getLogger(__name__)

# Larger than most caches, for machines that do not report the size of theirs.
_ASSUMED_CACHE = 2**26


class Admitted(NamedTuple):
    """A rival that passed the gate, with one prepared call for each copy of the tensors."""

    ours: bool
    calls: list[Call]
    errors: dict[str, float]


def run_cases(
    cases: Sequence[Case], rivals: Sequence[Rival], device: torch.device, effort: Effort
) -> Iterator[CaseResult[Case]]:
    """Yields the result of each case as soon as it is known."""
    clock = clock_for(device)
    for case in cases:
        yield run_case(case, rivals, device, effort, clock)


def run_case(
    case: Case, rivals: Sequence[Rival], device: torch.device, effort: Effort, clock: Clock
) -> CaseResult[Case]:
    """Measures each rival that supports the case and computes it correctly."""
    copies = _copies(case, device)
    expected = expect(case, copies[0])
    verdicts = {rival.name: _admit_rival(rival, case, copies, expected) for rival in rivals}
    return measure(case, verdicts, device, effort, clock)


def measure(
    case: C, verdicts: Mapping[str, Admitted | Measurement], device: torch.device, effort: Effort, clock: Clock
) -> CaseResult[C]:
    """Times the admitted rivals by turns, then measures their memory. The other verdicts stay unchanged."""
    admitted = {name: v for name, v in verdicts.items() if isinstance(v, Admitted)}
    calls = dict(zip(admitted, in_turn([a.calls for a in admitted.values()]), strict=True))
    samples = interleave(calls, clock, effort)
    measurements = [
        verdict
        if isinstance(verdict, Measurement)
        else Measurement(
            name,
            verdict.ours,
            RAN,
            errors=verdict.errors,
            seconds=samples.seconds[name],
            peak_bytes=peak_bytes(calls[name], device),
        )
        for name, verdict in verdicts.items()
    ]
    return CaseResult(case, measurements, samples.dropped, samples.quiet)


def _copies(case: Case, device: torch.device) -> list[Data]:
    """The tensors, in several copies for a cold case on the CPU. On CUDA the clock flushes the cache."""
    if case.cold and device.type == "cpu":
        return make_cold_data(case, device, last_level_cache() or _ASSUMED_CACHE)
    return [make_data(case, device)]


def _admit_rival(
    rival: Rival, case: Case, copies: Sequence[Data], expected: dict[str, Expected]
) -> Admitted | Measurement:
    reason = rival.why_not(case, copies[0])
    if reason is not None:
        return Measurement(rival.name, rival.ours, SKIPPED, reason)
    return admit(rival.name, rival.ours, lambda: [rival.prepare(case, data) for data in copies], expected)


def admit(
    name: str, ours: bool, prepare: Callable[[], list[Call]], expected: dict[str, Expected]
) -> Admitted | Measurement:
    """Prepares a rival's calls and compares the results of one call with the expected ones."""
    try:
        calls = prepare()
        verdict = check(expected, calls[0]())
    except Exception as error:
        # An exception of a rival is a result and must not end the run.
        logger.info("%s failed", name, exc_info=True)
        return Measurement(name, ours, FAILED, _first_line(error))
    if not verdict.right:
        return Measurement(name, ours, WRONG, "; ".join(verdict.problems), errors=verdict.errors)
    return Admitted(ours, calls, verdict.errors)


def _first_line(error: BaseException) -> str:
    """The first line of the innermost error: compilers wrap the one that names the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def in_turn(calls: Sequence[Sequence[Call]]) -> list[Callable[[], object]]:
    """For each rival a call that uses the next copy of the tensors. One counter serves all rivals.

    With a counter each, the second rival would find in the caches what the first has just read.
    """
    turn = count()

    def next_call(of_one_rival: Sequence[Call]) -> Callable[[], object]:
        if len(of_one_rival) == 1:
            return of_one_rival[0]
        return lambda: of_one_rival[next(turn) % len(of_one_rival)]()

    return [next_call(one) for one in calls]
