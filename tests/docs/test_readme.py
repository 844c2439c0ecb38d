"""The README's snippets run, one after the other, and its pictures are what the library does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import fastattn

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_snippets_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])  # what a snippet installs is gone afterwards
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 4
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]
    assert "This call runs on the backend" in capsys.readouterr().out
    assert names["tokens"].shape == (1, 24)  # type: ignore[attr-defined]


PICTURES = (
    {"causal": True},
    {"causal": True, "causal_alignment": "top-left"},
    {"window": (1, 0)},
    {"causal": True, "kv_lengths": torch.tensor([4], dtype=torch.int32)},
)


def test_pictures_of_masks() -> None:
    picture = README.split("causal, bottom-right ")[1].split("```")[0]
    rows = [re.findall(r"[x.](?: [x.]){4}", line) for line in picture.splitlines()[1:4]]
    q, k, v = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 5, 4), torch.eye(5)[None, None]
    for i, options in enumerate(PICTURES):
        seen = fastattn.attention(q, k, v, **options)[0, 0] > 0
        drawn = [[mark == "x" for mark in row[i].split()] for row in rows]
        assert seen.tolist() == drawn, options


def test_docstring_picture_is_the_same() -> None:
    assert fastattn.attention.__doc__ is not None
    for line in (
        "x x x . .              x . . . .            . x x . .",
        "x x x x x              x x x . .            . . . x x",
    ):
        assert line in fastattn.attention.__doc__


def test_files_named_exist() -> None:
    for name in re.findall(r"`((?:tests|fastattn|benchmarks|examples|csrc)/[\w/.]*)`", README):
        assert (ROOT / name).exists(), name


def test_pictures_exist_and_nothing_is_left_to_fill_in() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for name in pictures:
        assert (ROOT / name).read_bytes().startswith(b"\x89PNG"), name
    assert not re.search(r"\b[A-Z]+_SECTION\b", README)


def test_make_targets_named_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    documents = README + (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"make ([a-z]+)\b(?:  |`)", documents):
        assert name in targets, name
