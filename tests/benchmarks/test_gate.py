"""A gate that refuses wrong results, with limits from eager attention's own error."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastattn
from benchmarks import gate, rivals
from benchmarks.data import make_data
from benchmarks.gate import expect, max_error

from .samples import CPU, Spoiled, tiny, verdict_on


def poke(position: int, value: float) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Changes one number of one output."""

    def spoil(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = [x.detach().clone() for x in found]
        changed[position].view(-1)[7] = value
        return tuple(changed)

    return spoil


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("spoiled", "complaint"),
    [
        (Spoiled(causal=False), "out is off by"),
        (Spoiled(scale=0.2), "out is off by"),
        (Spoiled(causal=False, window=(None, 1)), "out is off by"),
        (Spoiled(causal_alignment="top-left"), "out is off by"),
        (Spoiled(poke(0, math.nan)), "out is off by inf"),
        (Spoiled(poke(1, 3.0)), "dq is off by"),
        (Spoiled(poke(2, -math.inf)), "dk is off by inf"),
        (Spoiled(lambda x: (*x[:3], 1.1 * x[3])), "dv is off by"),
        (Spoiled(lambda x: (x[0][:, :, 1:], *x[1:])), "out has shape"),
        (Spoiled(lambda x: x[:1]), "1 outputs instead of 4"),
    ],
)
def test_the_gate_refuses_a_wrong_result(spoiled: Spoiled, complaint: str, dtype: str) -> None:
    case = tiny(causal=True, seqlen=24, seqlen_k=40, mode="train", dtype=dtype)
    assert verdict_on(Spoiled(), case).right
    verdict = verdict_on(spoiled, case)
    assert not verdict.right
    assert any(complaint in problem for problem in verdict.problems)


@pytest.mark.parametrize(
    ("result", "wanted", "error"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([math.nan, 2.0], [math.nan, 2.0], 0.0),
        ([math.inf, 2.0], [math.inf, 1.0], 1.0),
        ([math.inf], [-math.inf], math.inf),
        ([math.nan], [math.inf], math.inf),
        ([1.0], [math.nan], math.inf),
        ([], [], 0.0),
    ],
)
def test_max_error_compares_nan_and_infinities_by_place(result: list[float], wanted: list[float], error: float) -> None:
    assert max_error(torch.tensor(result), torch.tensor(wanted, dtype=torch.float64)) == error


def test_limits_are_twice_eagers_error_and_a_floor() -> None:
    case = tiny(dtype="bfloat16")
    data = make_data(case, CPU)
    exact = fastattn.reference.attention(*(x.double() for x in data[:3]))
    eager = rivals.eager_attention(data.q, data.k, data.v, None, None)
    limit = expect(case, data)["out"].limit
    # The gate runs eager attention head by head, whose rounding may differ a little.
    assert limit == pytest.approx(2 * max_error(eager, exact) + 2e-2 * exact.abs().max().item(), rel=0.1)


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_what_is_expected_does_not_depend_on_how_much_is_evaluated_at_once(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = tiny(causal=True, batch=2, heads=6, heads_kv=3, seqlen=8, mode=mode)
    data = make_data(case, CPU)
    found = []
    for scores in (1, 2 * 2 * 8 * 8, 10**6):  # one key/value head, two, all three
        monkeypatch.setattr(gate, "SCORES_AT_ONCE", scores)
        found.append(expect(case, data))
    for other in found[1:]:
        for name, wanted in found[0].items():
            assert torch.allclose(other[name].values, wanted.values, rtol=1e-12, atol=1e-12)
            assert wanted.values.abs().amax(dim=(-2, -1)).min() > 0  # every head was evaluated
