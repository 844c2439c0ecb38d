"""Submodules that are there as attributes of their package, and are imported when somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def on_demand(
    package: str, submodules: Sequence[str], names: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The package's `__getattr__` (PEP 562) and `__dir__`, which lists these and the `names` alone."""

    def find(name: str) -> Any:
        if name in submodules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find, lambda: sorted({*submodules, *names})
