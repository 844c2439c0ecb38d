"""Options of `pytest benchmarks`."""

import pytest

from .suites import DEFAULT_SUITE, SUITES


def pytest_addoption(parser: pytest.Parser) -> None:
    """--bench-suite and --bench-device."""
    group = parser.getgroup("fastattn benchmarks")
    group.addoption("--bench-suite", choices=sorted(SUITES), default=DEFAULT_SUITE, help="which cases to time")
    group.addoption("--bench-device", default="cpu", help="cpu or cuda")
