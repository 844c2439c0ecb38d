"""The report as text: header, one row per case and rival, summary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic

from ..cases import Case
from ..costs import bytes_moved, flops
from ..measurements import RAN, SKIPPED, AnyCase, C, CaseResult, Findings, Measurement
from ..peaks import Peaks

RATIO_LINE = "ratio     the rival's time over the first fastattn's, median over rounds; above 1 fastattn wins"


def header_lines(header: Mapping[str, Any], peaks: Peaks) -> Iterator[str]:
    """Machine, versions and ceilings, and how to read the table."""
    yield from machine_lines(header)
    yield from _ceiling_lines(peaks)
    yield RATIO_LINE
    ceiling = "multiply-adds alone" if peaks.multiply_adds else "torch.mm (the faster of the dtype and float32)"
    yield f"peak      share of {ceiling} and of torch.sum's bandwidth"


def machine_lines(header: Mapping[str, Any]) -> Iterator[str]:
    """Machine, versions, and how time and memory are measured."""
    commit = "not in a git checkout" if header["commit"] is None else header["commit"][:12]
    dirty = " with uncommitted changes" if header["dirty"] else ""
    cpu = f"{header['cpu']}, {header['cores']} cores, {header['cpu_isa']}, last-level cache "
    yield f"machine   {cpu}{_size(header['last_level_cache_bytes'])}, memory {_size(header['memory_bytes'])}"
    if header["gpu"] is not None:
        yield f"gpu       {header['gpu']}, memory {_size(header['gpu_memory_bytes'])}, CUDA {header['cuda']}"
    yield f"system    {header['os']}"
    package = f"fastattn {header['fastattn']} ({commit}{dirty}), CPU kernels for {header['kernels']}"
    yield f"versions  Python {header['python']}, torch {header['torch']}, {package}"
    load = "unknown" if header["load_average"] is None else f"{header['load_average']:.2f}"
    yield f"run       {header['date']}, {header['device']}, {header['threads']} threads, load average {load}"
    yield f"clock     {header['clock']}, rounds A B A B; a round is dropped if others had the cores"
    yield f"memory    {header['memory_method'] or 'not measured: this system has no way to reset the peak'}"


def _ceiling_lines(peaks: Peaks) -> Iterator[str]:
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in peaks.flops.items())
    yield f"ceilings  torch.mm at most {peaks.matmul_size} square, GFLOP/s: {rates}"
    if peaks.multiply_adds:
        rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in peaks.multiply_adds.items())
        yield f"          multiply-adds alone, GFLOP/s: {rates}"
    bandwidths = f"torch.sum {peaks.read_bandwidth / 1e9:.1f}, Tensor.copy_ {peaks.copy_bandwidth / 1e9:.1f}"
    yield f"          over {_size(peaks.buffer_bytes)}, GB/s: {bandwidths}"
    if not peaks.quiet:
        yield "          too low, since other processes had the cores meanwhile: shares of them say little"


class Table(ABC, Generic[C]):
    """Aligned columns whose rows can be printed while the run goes on; what its columns are a subclass says."""

    columns: tuple[str, ...]
    widths: tuple[int, ...]

    def __init__(self, cases: Sequence[C], rival_names: Sequence[str]) -> None:
        self.count = len(cases)
        self._case_width = max(len(_title(case)) for case in cases)
        self._rival_width = max(len(name) for name in rival_names)

    @abstractmethod
    def figures(self, result: CaseResult[C], m: Measurement) -> tuple[str, ...]:
        """The cells of a measurement that ran."""

    def head(self) -> str:
        """The names of the columns."""
        return self._line("case", "rival", self.columns)

    def rows(self, result: CaseResult[C]) -> Iterator[str]:
        """One row for each rival that ran, was wrong or failed; the summary has the reasons of the others."""
        title, mark = _title(result.case), "" if result.quiet else " ~"
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
            *time_cells(result, m),
            f"{flop_rate / 1e9:.1f}",
            f"{flop_rate / self._peaks.flops_ceiling(result.case.dtype):.0%}",
            f"{byte_rate / 1e9:.2f}",
            f"{byte_rate / self._peaks.read_bandwidth:.0%}",
            memory_cell(m),
        )


def time_cells(result: CaseResult[Any], m: Measurement) -> tuple[str, str, str]:
    """Median and quartiles in milliseconds, and the ratio."""
    (first, third), ratio = m.quartiles, result.ratio(m)
    quartiles = f"{_milliseconds(first)}-{_milliseconds(third)}"
    return _milliseconds(m.median), quartiles, "-" if ratio is None else f"{ratio:.2f}"


def memory_cell(m: Measurement) -> str:
    """Peak memory in MiB."""
    return "-" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.1f}"


def summary_lines(run: Findings[Any]) -> Iterator[str]:
    """Geometric means per family, the worst cases, and what did not run."""
    yield from _mean_lines(run)
    yield from _worst_lines(run)
    yield from _not_run_lines(run.results)
    disturbed = sum(not result.quiet for result in run.results)
    if disturbed:
        yield f"~ {_cases(disturbed)} disturbed by other processes throughout: these figures are doubtful"
    for case, m in run.failures():
        yield f"FAILED: {m.rival} {m.status} on {_title(case)}: {m.reason}"


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
        yield f"  {ratio:8.3f}  {rival:<10} {_title(case)}"


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


def _title(case: AnyCase) -> str:
    return f"{case.family}: {case.name}"


def _milliseconds(seconds: float) -> str:
    """To a thousandth, or to four digits or more of what is longer, so that columns stay narrow."""
    milliseconds = seconds * 1e3
    return f"{milliseconds:.{3 if milliseconds < 100 else 1 if milliseconds < 1e4 else 0}f}"


def _size(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _cases(number: int) -> str:
    return f"{number} case" if number == 1 else f"{number} cases"
