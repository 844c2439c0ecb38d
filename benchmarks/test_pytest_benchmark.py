"""The same cases under pytest-benchmark: `pytest benchmarks --bench-suite forward -k "sdpa and bfloat16"`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from .cases import Case
from .costs import flops
from .data import Data, make_data
from .gate import Expected, check, expect
from .rivals import Eager, Fastattn, Rival, Sdpa
from .suites import DEFAULT_SUITE, SUITES

RIVALS = (Fastattn(), Sdpa(), Eager())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case of the chosen suite with every rival."""
    suite = metafunc.config.getoption("bench_suite", default=DEFAULT_SUITE)
    metafunc.parametrize("case", SUITES[suite], ids=lambda case: f"{case.family}: {case.name}")
    metafunc.parametrize("rival", RIVALS, ids=lambda rival: rival.name)


@lru_cache(maxsize=1)
def _prepared(case: Case, device: torch.device) -> tuple[Data, dict[str, Expected]]:
    """Tensors and expected results. The rivals of one case run in succession and share them."""
    data = make_data(case, device)
    return data, expect(case, data)


def test_case(benchmark: Any, request: pytest.FixtureRequest, case: Case, rival: Rival) -> None:
    """Times one call, after a check of its result."""
    device = torch.device(request.config.getoption("bench_device", default="cpu"))
    data, expected = _prepared(case, device)
    reason = rival.why_not(case, data)
    if reason is not None:
        pytest.skip(reason)
    call = rival.prepare(case, data)
    verdict = check(expected, call())
    assert verdict.right, "; ".join(verdict.problems)

    def synchronized() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = f"{case.family}: {case.name}"
    benchmark.extra_info.update(case=case.to_json(), rival=rival.name, flops=flops(case), errors=verdict.errors)
    benchmark(synchronized)
