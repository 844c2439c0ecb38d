"""Tests of the harness run on one thread; a rival that takes a case must compute it right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import rivals
from benchmarks.cases import Case
from benchmarks.data import make_data
from benchmarks.gate import check, expect

from .samples import CPU


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Parallel regions of tiny calls stall for milliseconds each when other tests hold the second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def is_right_if_willing(rival: rivals.Rival, case: Case) -> None:
    data = make_data(case, CPU)
    reason = rival.why_not(case, data)
    if reason is not None:
        pytest.skip(reason)
    verdict = check(expect(case, data), rival.prepare(case, data)())
    assert verdict.right, verdict.problems
    assert list(verdict.errors) == (["out", "dq", "dk", "dv"] if case.train else ["out"])
