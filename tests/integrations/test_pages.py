"""The snippets of the pages on integrations run, each page in a process of its own; files that they name exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {"torch-sdpa.md": "runs on fastattn", "flash-attn.md": "True", "dtensor.md": "(Shard(dim=1),)"}


@pytest.mark.parametrize("name", PAGES)
def test_snippets_run(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    program = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    assert program
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert PAGES[name].replace("runs", "would run") in done.stdout
    for file in re.findall(r"`(tests/[\w/.]*)`", text):
        assert (ROOT / file).exists(), file
