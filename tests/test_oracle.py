"""The oracle itself: its formulas against finite differences, its generator against the published vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from . import eager, oracle
from .cases import COMBINATIONS, PAIRS, VARLEN, Case, as_arrays, build, evaluate
from .tolerance import assert_close

# Random123, kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, result: str) -> None:
    assert oracle.philox4x32_10(words(counter), words(key)) == words(result)


def test_philox_rows_are_philox_words() -> None:
    seed, row = 0x0123_4567_89AB_CDEF, 11
    rows = oracle.philox_rows(seed, row, 3, 10)
    for i in range(3):
        for j in range(10):
            word = oracle.philox4x32_10((j // 4, i, row, 0), (seed & 0xFFFFFFFF, seed >> 32))[j % 4]
            assert rows[i, j] == word


def perturbed(case: Case, name: str, step: float, direction: np.ndarray, cotangents: dict[str, Any]) -> float:
    """The value whose gradient the cotangents ask for, with one input moved."""
    call = as_arrays(build(case, torch.float64))
    moved = call.leaves[name] + step * direction
    if name in call.options:
        call.options[name] = moved
    else:
        setattr(call, name, moved)
    result = evaluate(oracle, call)
    seen = np.isfinite(result.lse)
    return np.sum(result.out * cotangents["dout"]) + np.sum(result.lse[seen] * cotangents["dlse"][seen])


SAMPLE = (*PAIRS[:: len(PAIRS) // 12], *COMBINATIONS, VARLEN[-1])


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_gradients_are_finite_differences(case: Case) -> None:
    random = np.random.default_rng(0)
    call = as_arrays(build(case, torch.float64))
    plain = evaluate(oracle, call)
    cotangents = {"dout": random.normal(size=plain.out.shape), "dlse": random.normal(size=plain.lse.shape)}
    grads = evaluate(oracle, call, **cotangents).grads
    for name, x in call.leaves.items():
        direction = random.normal(size=x.shape)
        ahead, behind = (perturbed(case, name, step, direction, cotangents) for step in (1e-5, -1e-5))
        np.testing.assert_allclose(np.sum(grads[name] * direction), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_oracle_and_eager_agree(case: Case) -> None:
    call = build(case, torch.float64)
    exact = evaluate(oracle, as_arrays(call))
    out, lse = evaluate(eager, call)
    assert_close("out", out, exact.out, None, torch.float64)
    assert_close("lse", lse, exact.lse, None, torch.float64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.tensor([1.0, 2.0]), "shape"),
        (torch.tensor([1.0, 2.0, torch.nan]), "NaN in the wrong places"),
        (torch.tensor([1.0, torch.inf, -torch.inf]), "inf in the wrong places"),
        (torch.tensor([1.0, 2.0, torch.inf]), "inf in the wrong places"),
        (torch.tensor([1.0, 2.25, -torch.inf]), "error 2.500e-01 exceeds 4.000e-05"),
    ],
)
def test_tolerance_refuses(wrong: torch.Tensor, message: str) -> None:
    exact = np.array([1.0, 2.0, -np.inf])
    assert_close("x", torch.tensor([1.0, 2.0, -torch.inf]), exact, None, torch.float32)
    with pytest.raises(AssertionError, match=message):
        assert_close("x", wrong, exact, None, torch.float32)


def test_tolerance_is_twice_the_error_of_eager() -> None:
    exact, eager_result = np.array([1.0, 2.0]), torch.tensor([1.5, 2.0])
    assert_close("x", torch.tensor([1.0, 2.9]), exact, eager_result, torch.float32)
    with pytest.raises(AssertionError, match=r"exceeds 1.000e\+00"):
        assert_close("x", torch.tensor([1.0, 3.1]), exact, eager_result, torch.float32)


def test_tolerance_of_a_sum_that_cancels() -> None:
    exact = np.array([1e-17, 0.0])
    assert_close("x", torch.tensor([1e-6, 0.0]), exact, None, torch.float32, largest_term=0.1)
    for term in (0.0, 1e-2):
        with pytest.raises(AssertionError, match="exceeds"):
            assert_close("x", torch.tensor([1e-6, 0.0]), exact, None, torch.float32, largest_term=term)
