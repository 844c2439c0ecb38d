"""A case is a call that can be made, and survives being written down."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from benchmarks.cases import Case
from benchmarks.suites import SUITES

from .samples import FEATURES, name_of, tiny


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, float64, got 'int8'"),
        ({"mode": "backward"}, "mode must be one of forward, train, got 'backward'"),
        ({"mask": "causal"}, "mask must be one of none, bool, additive, got 'causal'"),
        ({"causal_alignment": "left"}, "causal_alignment must be one of bottom-right, top-left, got 'left'"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"heads_q": 3, "heads_kv": 2}, "heads_q must be a multiple of heads_kv, got 3 and 2"),
        ({"lengths_q": (24,)}, "lengths_q and lengths_k go together"),
        ({"lengths_q": (24,), "lengths_k": (24, 3)}, r"lengths_k must hold 1 lengths from 1 to exactly 24"),
        ({"lengths_q": (23,), "lengths_k": (24,)}, r"lengths_q must hold 1 lengths from 1 to exactly 24"),
        ({"lengths_q": (24,), "lengths_k": (24,), "mask": "bool"}, "mask must be 'none' when lengths_q"),
    ],
)
def test_a_case_refuses_what_is_no_call(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny(), **changes)


@pytest.mark.parametrize("case", [*FEATURES, *SUITES["all"], *SUITES["sweep60"]], ids=name_of)
def test_a_case_survives_json(case: Case) -> None:
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
