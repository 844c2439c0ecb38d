"""The page on Hugging Face Transformers: its snippet runs, its table is of the models that are tested."""

from __future__ import annotations

import re
from pathlib import Path

from tests.integrations.huggingface_models import ARCHITECTURES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "huggingface.md").read_text()


def test_snippet_runs() -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(snippets) == 1
    names: dict[str, object] = {}
    exec(compile(snippets[0], "docs/huggingface.md", "exec"), names)
    assert names["generated"].shape[0] == 2  # type: ignore[attr-defined]
    model = names["model"]
    assert model.config._attn_implementation == "fastattn"  # type: ignore[attr-defined]
    assert all(x.grad is not None for x in model.parameters())  # type: ignore[attr-defined]


def test_table_names_the_models_that_are_tested() -> None:
    rows = re.findall(r"^\| ([^|]+?)(?: \(text\))? \|[^|]*\| ([^|]*) \| ([^|]*) \|$", PAGE, flags=re.MULTILINE)
    listed = {name: (five, four) for name, five, four in rows if name in ARCHITECTURES}
    assert listed.keys() == ARCHITECTURES.keys()
    for name, (five, four) in listed.items():
        architecture = ARCHITECTURES[name]
        assert five.startswith("yes"), name
        assert ("tokens" in five) == architecture.generates, name
        assert four.startswith("yes" if architecture.needs < (5, 0) else "no"), name


def test_files_named_exist() -> None:
    for name in re.findall(r"`((?:tests|fastattn)/[\w/.]*)`", PAGE):
        assert (ROOT / name).exists(), name
