"""Every rival that is always there computes every feature, or says why not."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import fastattn
from benchmarks import rivals
from benchmarks.cases import Case
from benchmarks.data import make_data
from benchmarks.rivals import eager

from ..conftest import is_right_if_willing
from ..samples import CPU, FEATURES, name_of, tiny


@pytest.mark.parametrize("case", FEATURES, ids=name_of)
@pytest.mark.parametrize(
    "rival",
    [rivals.Fastattn(), *map(rivals.Fastattn, fastattn.available_backends()), rivals.Sdpa(), rivals.Eager()],
    ids=lambda rival: rival.name,
)
def test_every_rival_computes_every_feature(rival: rivals.Rival, case: Case) -> None:
    is_right_if_willing(rival, case)


def test_a_named_backend_gives_fastattns_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny()
    data = make_data(case, CPU)
    assert rivals.Fastattn("reference").why_not(case, data) is None

    def refuse(*_: Tensor, backend: str, **__: Any) -> None:
        raise ValueError(f"backend {backend!r} cannot compute this call: too tiny")

    monkeypatch.setattr(fastattn, "explain", refuse)
    assert rivals.Fastattn("reference").why_not(case, data) == (
        "backend 'reference' cannot compute this call: too tiny"
    )
    assert rivals.Fastattn().why_not(case, data) is None


def test_eager_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny(mode="train")
    data = make_data(case, CPU)
    assert rivals.Eager().why_not(case, data) is None
    monkeypatch.setattr(eager, "free_memory", lambda _: 6 * 2 * 24 * 24 * 4 - 1)
    assert "are free" in (rivals.Eager().why_not(case, data) or "")
