"""The table of a report: one row for each case and rival."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Generic

from ..cases import Case
from ..costs import bytes_moved, flops
from ..measurements import RAN, SKIPPED, AnyCase, C, CaseResult, Measurement
from ..models.cases import ModelCase
from ..peaks import Peaks


class Table(ABC, Generic[C]):
    """Aligned columns whose rows can be printed during the run. Subclasses define the columns."""

    columns: tuple[str, ...]
    widths: tuple[int, ...]

    def __init__(self, cases: Sequence[C], rival_names: Sequence[str]) -> None:
        self.count = len(cases)
        self._case_width = max(len(case_title(case)) for case in cases)
        self._rival_width = max(len(name) for name in rival_names)

    @abstractmethod
    def figures(self, result: CaseResult[C], m: Measurement) -> tuple[str, ...]:
        """The cells of a measurement that ran."""

    def head(self) -> str:
        """The names of the columns."""
        return self._line("case", "rival", self.columns)

    def rows(self, result: CaseResult[C]) -> Iterator[str]:
        """One row for each rival that ran, was wrong or failed. The summary has the reasons of the others."""
        title, mark = case_title(result.case), "" if result.quiet else " ~"
        for measurement in result.measurements:
            if measurement.status == SKIPPED:
                continue
            if measurement.status == RAN:
                yield self._line(title, measurement.rival, self.figures(result, measurement)) + mark
            else:
                yield f"{self._line(title, measurement.rival, ())} {measurement.status}: {measurement.reason}"
            title = ""

    def _line(self, case: str, rival: str, figures: Sequence[str]) -> str:
        cells = [f"{figure:>{width}}" for figure, width in zip(figures, self.widths, strict=False)]
        return " ".join([f"{case:<{self._case_width}}", f"{rival:<{self._rival_width}}", *cells])


class CallTable(Table[Case]):
    """Attention calls: their rates, and the share of the machine's ceilings."""

    columns = ("ms", "quartiles", "ratio", "GFLOP/s", "peak", "GB/s", "peak", "MiB")
    widths = (8, 15, 7, 9, 5, 7, 5, 8)

    def __init__(self, cases: Sequence[Case], rival_names: Sequence[str], peaks: Peaks) -> None:
        super().__init__(cases, rival_names)
        self._peaks = peaks

    def figures(self, result: CaseResult[Case], m: Measurement) -> tuple[str, ...]:
        """Time, ratio, rates with their shares, memory."""
        flop_rate, byte_rate = flops(result.case) / m.median, bytes_moved(result.case) / m.median
        return (
            *_time_cells(result, m),
            f"{flop_rate / 1e9:.1f}",
            f"{flop_rate / self._peaks.flops_ceiling(result.case.dtype):.0%}",
            f"{byte_rate / 1e9:.2f}",
            f"{byte_rate / self._peaks.read_bandwidth:.0%}",
            _memory_cell(m),
        )


class ModelTable(Table[ModelCase]):
    """Work on models: tokens per second, padding not counted."""

    columns = ("ms", "quartiles", "ratio", "tokens/s", "MiB")
    widths = (8, 17, 7, 9, 8)

    def figures(self, result: CaseResult[ModelCase], m: Measurement) -> tuple[str, ...]:
        """Time, ratio, rate, memory."""
        return (*_time_cells(result, m), f"{result.case.tokens / m.median:.0f}", _memory_cell(m))


def _time_cells(result: CaseResult[Any], m: Measurement) -> tuple[str, str, str]:
    """Median and quartiles in milliseconds, and the ratio."""
    (first, third), ratio = m.quartiles, result.ratio(m)
    quartiles = f"{_milliseconds(first)}-{_milliseconds(third)}"
    return _milliseconds(m.median), quartiles, "-" if ratio is None else f"{ratio:.2f}"


def _memory_cell(m: Measurement) -> str:
    """Peak memory in MiB."""
    return "-" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.1f}"


def case_title(case: AnyCase) -> str:
    """The family and the name: unique in a run."""
    return f"{case.family}: {case.name}"


def _milliseconds(seconds: float) -> str:
    """Three decimals, and fewer for long times, so that columns stay narrow."""
    milliseconds = seconds * 1e3
    return f"{milliseconds:.{3 if milliseconds < 100 else 1 if milliseconds < 1e4 else 0}f}"
