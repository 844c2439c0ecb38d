"""The backends in C++: `cpu` and `cuda`, and what they share. The modules they call are built from csrc/."""

from __future__ import annotations

from importlib.machinery import PathFinder
from pathlib import Path


def why_not_imported(name: str, error: ImportError) -> str:
    """Why `from fastattn import name` failed: Python blames a circular import where there is no such file at all."""
    package = Path(__file__).parents[2]
    missing = PathFinder.find_spec(f"fastattn.{name}", [str(package)]) is None
    return f"there is no fastattn.{name} in {package}" if missing else str(error)
