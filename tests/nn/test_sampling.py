"""How the next token is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn.nn import Sampler

LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()[torch.tensor([2, 0, 3, 1])].expand(2, 4)  # best is token 1


def kept(**options: Any) -> list[int]:
    """Tokens that may be drawn."""
    logits = Sampler(do_sample=True, **options).filtered(LOGITS)
    return (logits[1] > -torch.inf).nonzero()[:, 0].tolist()


def test_greedy() -> None:
    assert Sampler()(LOGITS).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.49}, [1]),
        ({"top_p": 0.51}, [1, 3]),
        ({"top_p": 0.76}, [0, 1, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # 0.5 of the 0.75 that are left
        ({"temperature": 0.5, "top_p": 0.6}, [1]),  # squared, the best one has 0.72
        ({"temperature": 4.0, "top_p": 0.6}, [0, 1, 3]),
    ],
    ids=str,
)
def test_which_tokens_stay(options: dict[str, Any], tokens: list[int]) -> None:
    assert kept(**options) == tokens


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies(temperature: float) -> None:
    n = 20000
    generator = torch.Generator().manual_seed(0)
    drawn = Sampler(do_sample=True, temperature=temperature)(LOGITS[:1].expand(n, 4), generator)
    expected = torch.softmax(LOGITS[0] / temperature, dim=0)
    found = torch.bincount(drawn, minlength=4) / n
    deviation = (expected * (1 - expected) / n).sqrt()
    assert ((found - expected).abs() < 5 * deviation).all()


def test_generator_decides() -> None:
    sampler = Sampler(do_sample=True)
    logits = LOGITS[:1].expand(50, 4)
    first, again, other = (sampler(logits, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_equal_logits_keep_no_more_than_asked() -> None:
    logits = torch.zeros(1, 5)
    assert (Sampler(True, top_k=2).filtered(logits) > -torch.inf).sum() == 2
    assert (Sampler(True, top_p=0.4).filtered(logits) > -torch.inf).sum() == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "temperature must be positive, got 0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 2.0}, TypeError, "top_k must be an integer, got float"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, ValueError, r"top_p must be in \(0, 1\], got 1.1"),
        ({"top_p": True}, TypeError, "top_p must be a number, got bool"),
        ({"do_sample": False, "top_k": 3}, ValueError, "need do_sample=True"),
        ({"do_sample": False, "temperature": 0.7}, ValueError, "need do_sample=True"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Sampler(**{"do_sample": True, **options})
