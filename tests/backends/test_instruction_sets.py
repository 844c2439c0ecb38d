"""The tests of what the kernels compute, again on every instruction set of this processor but the one in use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn import _cpu

TESTS = ("forward", "backward", "varlen", "kv_cache", "nonfinite", "dropout", "properties", "sdpa", "merge")
OTHERS = [name for name in _cpu.instruction_sets() if name != _cpu.instruction_set()]


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", OTHERS)
def test_what_the_kernels_compute(instruction_set: str) -> None:
    files = [f"tests/test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "cpu", *files]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["FASTATTN_CPU_ISA"] = instruction_set
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-1000:]
    assert " passed" in found.stdout
