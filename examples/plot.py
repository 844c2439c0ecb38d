"""The picture of a training run: both loss curves, and how far they are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .training import Training


def plot(training: Training, path: Path) -> None:
    """Draws the run so far as a PNG. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    curves, difference = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_curves(curves, training)
    _draw_difference(difference, training)
    FigureCanvasAgg(figure).print_png(str(path))


def _draw_curves(axes: Any, training: Training) -> None:
    corpus = training.corpus
    ours, theirs = (arm.losses for arm in training.arms.values())
    steps = range(1, training.step + 1)
    axes.plot(steps, ours, color="tab:blue", linewidth=4, alpha=0.45, label="fastattn, training")
    axes.plot(steps, theirs, color="black", linewidth=0.8, linestyle="--", label="torch SDPA, training")
    if training.validation:
        at, losses = zip(*training.validation, strict=True)
        axes.plot(at, losses, "o-", color="tab:red", label="fastattn, validation")
    for name, loss in (("unigram", corpus.unigram_loss()), ("bigram", corpus.bigram_loss())):
        axes.axhline(loss, color="gray", linewidth=0.8, linestyle=":")
        axes.annotate(f"{name} {loss:.2f}", (training.step, loss), ha="right", va="bottom", color="gray")
    axes.set(
        ylabel="cross-entropy (nats per character)",
        title="The same character-level language model, the same seed, two attention functions",
    )
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_difference(axes: Any, training: Training) -> None:
    # Equal losses have no place on a logarithmic axis: they stand at its lower end.
    differences = [max(value, 1e-8) for value in training.differences()]
    axes.semilogy(range(1, training.step + 1), differences, ".", color="tab:blue", markersize=3)
    axes.set(xlabel="step", ylabel="|difference|\nof training losses")
    axes.grid(alpha=0.3)
