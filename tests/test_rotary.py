"""apply_rotary against a rotation of complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastattn import Rotary, apply_rotary

from . import cases, eager, oracle
from .cache_cases import tables
from .tolerance import assert_close, to_numpy

SIZES = ((8, 8), (16, 6), (7, 6), (64, 64), (5, 2), (9, 0))  # head_dim, rotary_dim


def positions_of(kind: str) -> Tensor:
    return {"shared": torch.tensor([3, 0, 11, 5]), "own": torch.tensor([[3, 0, 11, 5], [1, 1, 2, 40]])}[kind]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["shared", "own"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), SIZES)
def test_rotates(head_dim: int, rotary_dim: int, interleaved: bool, kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, head_dim, dtype=torch.float64).to(dtype)
    rotary, positions = tables(rotary_dim, 41, interleaved, dtype, "cpu"), positions_of(kind)
    rows = positions.expand(2, 4)
    turn = (to_numpy(rotary.cos), to_numpy(rotary.sin), interleaved, rows.numpy())
    found = apply_rotary(x, rotary, positions)
    assert found.dtype == dtype
    assert_close("rotated", found, oracle.rotate(to_numpy(x), *turn), eager.rotate(x, *rotary, rows), dtype)
    assert torch.equal(found, apply_rotary(x, rotary, positions.int()))


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs(interleaved: bool) -> None:
    """A quarter turn of the first pair shows which features belong together."""
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    x = torch.arange(1.0, 6.0).view(1, 1, 1, 5)
    turned = apply_rotary(x, Rotary(cos, sin, interleaved), torch.zeros(1, dtype=torch.int64))
    want = [-2.0, 1.0, 3.0, 4.0, 5.0] if interleaved else [-3.0, 2.0, 1.0, 4.0, 5.0]
    assert turned.flatten().tolist() == want


def test_pair_of_tables_is_not_interleaved() -> None:
    x, rotary, positions = torch.randn(1, 2, 4, 8), tables(8, 12, False, torch.float32, "cpu"), positions_of("shared")
    assert torch.equal(apply_rotary(x, (rotary.cos, rotary.sin), positions), apply_rotary(x, rotary, positions))
    assert Rotary(rotary.cos, rotary.sin).interleaved is False


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind()
    rotary = tables(8, 60, interleaved, torch.float64, "cpu")

    def score(i: int, j: int) -> Tensor:
        turned = (apply_rotary(x, rotary, torch.tensor([at])) for x, at in ((q, i), (k, j)))
        return torch.mul(*turned).sum()

    torch.testing.assert_close(score(17, 5), score(52, 40))
    assert abs(score(17, 5) - score(17, 6)) > 1e-3


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(interleaved: bool) -> None:
    x = torch.randn(2, 2, 4, 7, dtype=torch.float64, requires_grad=True)
    rotary = tables(6, 41, interleaved, torch.float64, "cpu")
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, rotary, positions_of("own")), x)
    assert torch.autograd.gradgradcheck(lambda x: apply_rotary(x, rotary, positions_of("own")), x)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 4, 8)}, ValueError, ["x ", "(2, 4, 8)", "(batch, heads, seqlen, head_dim)"]),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, ValueError, ["positions", "(3,)", "(4,)", "(2, 4)"]),
        ({"positions": torch.zeros(4)}, TypeError, ["positions", "torch.float32", "torch.int64"]),
        ({"cos": torch.zeros(6, 5)}, ValueError, ["rotary", "(6, 5)", "(6, 4)"]),
        ({"sin": torch.zeros(6, 3)}, ValueError, ["rotary.sin", "(6, 3)", "(6, 4)"]),
        ({"cos": torch.zeros(6, 5), "sin": torch.zeros(6, 5)}, ValueError, ["rotary.cos", "5 columns", "head_dim 8"]),
        ({"cos": torch.zeros(4), "sin": torch.zeros(4)}, ValueError, ["rotary.cos", "(4,)", "max_positions"]),
    ],
)
def test_bad_input(change: dict[str, Tensor], error: type[Exception], words: list[str]) -> None:
    given = {"x": torch.zeros(2, 3, 4, 8), "cos": torch.zeros(6, 4), "sin": torch.zeros(6, 4)}
    given = {"positions": torch.zeros(4, dtype=torch.int64), **given, **change}
    with pytest.raises(error) as caught:
        apply_rotary(given["x"], Rotary(given["cos"], given["sin"]), given["positions"])
    for word in words:
        assert word in str(caught.value)
