"""Time and rate over the sequence length, log-log, one curve per rival. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cases import Case
from ..costs import flops
from ..measurements import RAN, CaseResult, Run

# Okabe and Ito's colours, distinct for colour-blind readers. Markers distinguish the curves in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = tuple(zip(COLORS, "os^DvPX", strict=True))
_MOST_COLUMNS = 4


def curves(results: Sequence[CaseResult[Case]]) -> dict[str, list[CaseResult[Case]]]:
    """Groups of two or more results that differ only in the sequence length, shortest first, by title."""
    groups: dict[Hashable, dict[int, CaseResult[Case]]] = {}
    for result in results:
        if not result.case.varlen:
            groups.setdefault(_kind(result.case), {})[result.case.seqlen_k] = result
    sweeps = [[group[s] for s in sorted(group)] for group in groups.values() if len(group) > 1]
    return {_title(sweep[0].case): sweep for sweep in sweeps}


def has_curves(cases: Sequence[Case]) -> bool:
    """Whether a run of these cases can be plotted."""
    return bool(curves([CaseResult(case, []) for case in cases]))


def plot(run: Run, path: Path) -> None:
    """Writes a PNG. Raises ValueError if no two cases differ only in the sequence length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sweeps = curves(run.results)
    if not sweeps:
        raise ValueError("there is nothing to plot: no two cases differ in the sequence length alone")
    columns = min(len(sweeps), _MOST_COLUMNS)
    bands = math.ceil(len(sweeps) / columns)
    figure = Figure(figsize=(max(7.0, 4.2 * columns), 6.4 * bands + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    styles = _styles(run)
    for number, (title, sweep) in enumerate(sweeps.items()):
        band, column = divmod(number, columns)
        _draw(axes[2 * band][column], axes[2 * band + 1][column], title, sweep, styles)
    for unused in range(len(sweeps), bands * columns):
        band, column = divmod(unused, columns)
        axes[2 * band][column].set_axis_off()
        axes[2 * band + 1][column].set_axis_off()
    handles = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    entries = max(1, min(len(handles), 4))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=entries, frameon=False)
    figure.suptitle(machine_line(run.header), fontsize=9)
    figure.savefig(path, dpi=130, format="png")


def _kind(case: Case) -> Hashable:
    """Everything except the lengths and the family. Whether the two lengths are equal is included."""
    fields = case.to_json()
    del fields["name"], fields["family"], fields["seqlen_k"], fields["seqlen_q"]
    return (*fields.values(), "square" if case.seqlen_q == case.seqlen_k else case.seqlen_q)


def _title(case: Case) -> str:
    words = [word for word in case.name.split() if not word.startswith("S")]
    if case.seqlen_q != case.seqlen_k:
        words.append(f"{case.seqlen_q} queries")
    return " ".join(words)


def _styles(run: Run) -> dict[str, tuple[str, str]]:
    names = dict.fromkeys(m.rival for result in run.results for m in result.measurements)
    return {name: _STYLES[i % len(_STYLES)] for i, name in enumerate(names)}


def _draw(
    times: Any, rates: Any, title: str, sweep: Sequence[CaseResult[Case]], styles: dict[str, tuple[str, str]]
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    lengths = [result.case.seqlen_k for result in sweep]
    for name, (color, marker) in styles.items():
        points = [
            (result.case.seqlen_k, m.median, flops(result.case) / m.median / 1e9, m.quartiles)
            for result in sweep
            for m in result.measurements
            if m.rival == name and m.status == RAN
        ]
        if not points:
            continue
        x, seconds, rate, quartiles = zip(*points, strict=True)
        style = {"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1.6, "label": name}
        times.plot(x, [1e3 * s for s in seconds], **style)
        low, high = zip(*quartiles, strict=True)
        times.fill_between(x, [1e3 * s for s in low], [1e3 * s for s in high], color=color, alpha=0.2, linewidth=0)
        rates.plot(x, rate, **style)
    times.set_title(title, fontsize=10)
    times.set_ylabel("time, ms")
    rates.set_ylabel("GFLOP/s")
    rates.set_xlabel("sequence length")
    for ax in (times, rates):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(lengths, [str(length) for length in lengths])
        ax.xaxis.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.grid(True, alpha=0.3)


def machine_line(header: Mapping[str, Any]) -> str:
    """Machine, versions and date of a run."""
    where = header["gpu"] or f"{header['cpu']}, {header['threads']} threads"
    return f"{where}; torch {header['torch']}, fastattn {header['fastattn']}; {header['date']}"
