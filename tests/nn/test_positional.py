"""Position encodings against their formulas."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

import fastattn
from fastattn.nn import (
    LearnedPositionalEncoding,
    RotaryEmbedding,
    SinusoidalPositionalEncoding,
    alibi_slopes,
)


@pytest.mark.parametrize("dim", [1, 2, 7, 16])
def test_sinusoidal_formula(dim: int) -> None:
    module = SinusoidalPositionalEncoding(dim, base=50.0)
    found = module(torch.zeros(2, 9, dim, dtype=torch.float64))
    for position in range(9):
        for feature in range(dim):
            angle = position * 50.0 ** (-(feature - feature % 2) / dim)
            expected = math.cos(angle) if feature % 2 else math.sin(angle)
            assert found[1, position, feature].item() == pytest.approx(expected, abs=1e-12)
    assert not list(module.parameters())
    assert not module.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_choose_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, dtype=dtype)
    positions = torch.tensor([[4, 0, 4], [1, 2, 3]])
    for module in (SinusoidalPositionalEncoding(6), LearnedPositionalEncoding(5, 6).to(dtype)):
        rows = module(torch.zeros(1, 5, 6, dtype=dtype))[0]
        for given in (positions, positions.int()):
            found = module(x, given)
            assert found.dtype == dtype
            torch.testing.assert_close(found, x + rows[positions])
        torch.testing.assert_close(module(x, positions[1]), x + rows[1:4])
        torch.testing.assert_close(module(x), x + rows[:3])


def test_learned_is_learned() -> None:
    torch.manual_seed(0)
    module = LearnedPositionalEncoding(5, 6)
    assert list(module.state_dict()) == ["weight"]
    module(torch.zeros(2, 3, 6)).sum().backward()
    assert torch.equal(module.weight.grad[:, 0], torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0]))


def test_sinusoidal_far_positions_keep_their_digits() -> None:
    position = 1_000_003
    found = SinusoidalPositionalEncoding(2)(torch.zeros(1, 1, 2), torch.tensor([position]))
    assert found[0, 0, 0].item() == pytest.approx(math.sin(position), abs=1e-6)


# ----------------------------------------------------------------------------------------------------- rotary


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(2, None), (10, None), (10, 4), (7, 6)])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_rotary_formula(interleaved: bool, dim: int, rotary_dim: int | None, base: float) -> None:
    torch.manual_seed(0)
    module = RotaryEmbedding(dim, base, interleaved, rotary_dim)
    rotary_dim = dim if rotary_dim is None else rotary_dim
    x = torch.randn(1, 2, 6, dim, dtype=torch.float64)
    found = module(x)
    torch.testing.assert_close(found[..., rotary_dim:], x[..., rotary_dim:], rtol=0, atol=0)
    for position in range(6):
        for pair in range(rotary_dim // 2):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary_dim // 2)
            angle = position * base ** (-2 * pair / rotary_dim)
            first, second = x[0, :, position, a], x[0, :, position, b]
            turned = (
                first * math.cos(angle) - second * math.sin(angle),
                second * math.cos(angle) + first * math.sin(angle),
            )
            torch.testing.assert_close(found[0, :, position, a], turned[0])
            torch.testing.assert_close(found[0, :, position, b], turned[1])


def test_rotary_position_ids() -> None:
    torch.manual_seed(0)
    module = RotaryEmbedding(8)
    x = torch.randn(2, 3, 4, 8)
    expected = module(torch.nn.functional.pad(x, (0, 0, 5, 0)))[:, :, 5:]
    for positions in (torch.arange(5, 9), torch.arange(5, 9).int(), torch.arange(5, 9).expand(2, 4)):
        torch.testing.assert_close(module(x, positions), expected)
    backwards = torch.stack((torch.arange(4), torch.arange(3, -1, -1)))
    torch.testing.assert_close(module(x, backwards)[1], module(x.flip(2))[1].flip(1))
    assert module(x.bfloat16(), backwards).dtype == torch.bfloat16


def test_rotary_tables_grow_and_fit_the_function() -> None:
    module = RotaryEmbedding(8, interleaved=True, max_positions=4)
    small = module.tables(3)
    assert isinstance(small, fastattn.Rotary)
    assert small.cos.shape == small.sin.shape == (3, 4)
    assert small.interleaved
    large = module.tables(100)
    assert large.cos.shape == (100, 4)
    torch.testing.assert_close(large.cos[:3], small.cos, rtol=0, atol=0)
    torch.testing.assert_close(large.sin[99, 0], torch.tensor(99.0).sin())
    x = torch.randn(1, 2, 100, 8)
    torch.testing.assert_close(fastattn.apply_rotary(x, large, torch.arange(100)), module(x))


def test_tables_made_in_inference_mode_serve_training() -> None:
    module = RotaryEmbedding(4)
    with torch.inference_mode():
        module(torch.randn(1, 2, 3, 4))
    x = torch.randn(3, 2, requires_grad=True)
    (x * module.tables(3).cos).sum().backward()  # autograd saves the table, and refuses inference tensors
    assert x.grad.equal(module.tables(3).cos)


def test_copies_leave_the_tables_behind() -> None:
    module = RotaryEmbedding(8, base=77.0, max_positions=5000)
    x = torch.randn(1, 1, 9, 8)
    expected = module(x)
    assert len(pickle.dumps(module)) < 5000
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ alibi


def test_alibi_slopes() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    # 3 heads: those of 2, then the first of 4. 6 heads: those of 4, then the first and third of 8.
    assert alibi_slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]
    assert alibi_slopes(6).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    torch.testing.assert_close(alibi_slopes(12)[8:], torch.tensor([2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]))
    for n in range(1, 40):
        slopes = alibi_slopes(n)
        assert slopes.shape == (n,)
        assert slopes.dtype == torch.float32
        assert slopes.unique().numel() == n
