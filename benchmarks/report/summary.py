"""The last lines of a report: geometric means, the worst cases, and what did not run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..measurements import SKIPPED, CaseResult, Findings
from .table import case_title


def summary_lines(run: Findings[Any]) -> Iterator[str]:
    """Geometric means per family, the worst cases, and what did not run."""
    yield from _mean_lines(run)
    yield from _worst_lines(run)
    yield from _not_run_lines(run.results)
    disturbed = sum(not result.quiet for result in run.results)
    if disturbed:
        yield f"~ {_cases(disturbed)} disturbed by other processes throughout: these figures are doubtful"
    for case, m in run.failures():
        yield f"FAILED: {m.rival} {m.status} on {case_title(case)}: {m.reason}"


def _mean_lines(run: Findings[Any]) -> Iterator[str]:
    means = run.geometric_means()
    if not means:
        return
    yield "geometric mean of the ratios"
    width = max(len(family) for family, _ in means)
    for (family, rival), (mean, number) in means.items():
        yield f"  {family:<{width}}  {rival:<10} {mean:8.2f}   ({_cases(number)})"


def _worst_lines(run: Findings[Any]) -> Iterator[str]:
    worst = run.worst(10)
    if worst:
        yield "worst cases against the fastest rival"
    for case, rival, ratio in worst:
        yield f"  {ratio:8.3f}  {rival:<10} {case_title(case)}"


def _not_run_lines(results: Iterable[CaseResult[Any]]) -> Iterator[str]:
    counts: dict[tuple[str, str], int] = {}
    for result in results:
        for m in result.measurements:
            if m.status == SKIPPED:
                counts[m.rival, m.reason] = counts.get((m.rival, m.reason), 0) + 1
    if counts:
        yield "not run"
    for (rival, reason), number in counts.items():
        yield f"  {rival}, {_cases(number)}: {reason}"


def _cases(number: int) -> str:
    return f"{number} case" if number == 1 else f"{number} cases"
