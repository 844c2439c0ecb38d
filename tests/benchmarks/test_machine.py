"""The header tells the machine, the versions and the commit."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from benchmarks import machine
from benchmarks.report.header import header_lines

from .samples import CPU, PEAKS


def test_the_header_tells_machine_and_versions() -> None:
    facts = machine.header(CPU)
    assert facts["torch"] == torch.__version__
    assert facts["fastattn"] == fastattn.__version__
    assert facts["python"] == sys.version.split()[0]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores"] >= 1
    assert facts["gpu"] is None
    json.dumps(facts)
    text = "\n".join(header_lines(facts | {"clock": "wall time", "memory_method": None}, PEAKS))
    for words in (
        str(facts["cpu"]),
        torch.__version__,
        f"{facts['threads']} threads",
        "not measured",
        facts["date"],
    ):
        assert words in text
    assert "float32 200, bfloat16 400" in text
    assert "too low" not in text
    disturbed = dataclasses.replace(PEAKS, quiet=False)
    assert "too low" in "\n".join(header_lines(facts | {"clock": "wall time", "memory_method": None}, disturbed))


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    tracked, untracked = tmp_path / "tracked.py", tmp_path / "untracked.py"
    tracked.write_text("1\n")
    git("add", "tracked.py")
    git("commit", "-q", "-m", "first")
    untracked.write_text("2\n")
    commit = git("rev-parse", "HEAD")
    assert machine.git_state(tracked) == (commit, False)
    assert machine.git_state(untracked) == (None, None)
    tracked.write_text("3\n")
    assert machine.git_state(tracked) == (commit, True)
