"""Speed of whole models against other attention, as bars. Needs matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..measurements import RAN, CaseResult
from ..models.cases import ModelCase
from ..models.measurements import OURS, ModelRun
from .plot import COLORS, machine_line

_WORKS = {"prefill": "prefill", "decode": "decoding", "encode": "forward", "train": "training step"}
_NAMES = {"llama": "Llama", "mistral": "Mistral", "bert": "BERT"}


def plot_models(run: ModelRun, path: Path) -> None:
    """Writes a PNG with the rivals' time over ours, one panel per dtype. Raises ValueError if there are no bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = [result for result in run.results if result.baseline is not None]
    dtypes = list(dict.fromkeys(result.case.dtype for result in results))
    rivals = [name for name in dict.fromkeys(m.rival for r in results for m in r.measurements) if name != OURS]
    if not results or not rivals:
        raise ValueError("there is nothing to plot: no case has a result of fastattn and a rival")
    rows = max(sum(result.case.dtype == dtype for result in results) for dtype in dtypes)
    width = 5.4 * len(dtypes) + 1.6
    figure = Figure(figsize=(width, 0.62 * rows + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharex=True)[0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        _draw(panel, dtype, [result for result in results if result.case.dtype == dtype], rivals)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    where = f"Transformers {run.header['transformers']}, {machine_line(run.header)}"
    figure.suptitle(textwrap.fill(f"{where}, random weights", int(12 * width)), fontsize=9)  # 12 letters per inch
    figure.savefig(path, dpi=130, format="png")


def _draw(panel: Any, dtype: str, results: Sequence[CaseResult[ModelCase]], rivals: Sequence[str]) -> None:
    height = 0.8 / len(rivals)
    for number, name in enumerate(rivals):
        ratios = [_ratio(result, name) for result in results]
        places = [row + (number - (len(rivals) - 1) / 2) * height for row in range(len(results))]
        # The other plots use the first colour for ours.
        bars = panel.barh(places, ratios, height, color=COLORS[number + 1], label=f"{name}'s time / {OURS}'s")
        panel.bar_label(bars, [f"{ratio:.2f}" if ratio else "" for ratio in ratios], padding=2, fontsize=8)
    panel.axvline(1.0, color="black", linewidth=1.0)
    panel.set_yticks(range(len(results)), [_label(result.case) for result in results], fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set_title(dtype, fontsize=10)
    panel.set_xlabel("above 1 fastattn is faster")
    panel.grid(True, axis="x", alpha=0.3)


def _ratio(result: CaseResult[ModelCase], rival: str) -> float:
    """The ratio, or 0 (no bar) if the rival did not run."""
    return next((result.ratio(m) or 0.0 for m in result.measurements if m.rival == rival and m.status == RAN), 0.0)


def _label(case: ModelCase) -> str:
    model = f"{_NAMES[case.family]} of {case.shape.num_hidden_layers} layers"
    words = f"{model}, {_WORKS[case.work]}\n{len(case.lengths)} x {case.seqlen} tokens"
    if case.shape.sliding_window is not None:
        words += f", window {case.shape.sliding_window}"
    return words + (", padded" if len(set(case.lengths)) > 1 else "")
