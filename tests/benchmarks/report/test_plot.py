"""The plot of time against length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.report.plot import has_curves, plot
from benchmarks.suites import SUITES

from ..samples import sample_run


def test_the_plot_is_a_picture_with_a_curve_for_each_rival(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    plot(sample_run(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = torch.from_numpy(image.imread(tmp_path / "plot.png"))[..., :3]
    assert min(pixels.shape[:2]) > 500
    for color in ("0072B2", "D55E00", "009E73"):
        rgb = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        assert ((pixels - rgb).abs().amax(dim=-1) < 0.01).sum() > 200


def test_a_plot_needs_two_lengths(tmp_path: Path) -> None:
    run = sample_run()
    del run.results[0]
    assert not has_curves([result.case for result in run.results])
    with pytest.raises(ValueError, match="there is nothing to plot"):
        plot(run, tmp_path / "plot.png")
    assert has_curves(SUITES["quick"])
