"""Generation with the cache is generation without it, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn.nn as fnn

V = 30
KINDS = ["rotary", "learned", "sinusoidal", "alibi"]

OPTIONS = [
    *({"positional": kind} for kind in KINDS),
    *({"positional": kind, "num_kv_heads": 2, "window": (4, 0)} for kind in KINDS),
    {"num_kv_heads": 1, "softcap": 2.0, "sinks": True, "qk_norm": True, "scale": 0.5},
]


def make_lm(**options: Any) -> fnn.TransformerLM:
    torch.manual_seed(0)
    return fnn.TransformerLM(V, 16, 32, 4, 2, **options).eval()


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of lengths 7, 3 and 1, padded on the left with tokens that would matter."""
    ids = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :6] = 0
    return ids, mask


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("page_size", [None, 4])
def test_cache_or_not(options: dict[str, Any], page_size: int | None) -> None:
    model = make_lm(**options)
    ids, mask = prompts()
    for padding in (None, mask):
        expected = model.generate(ids, 12, attention_mask=padding, use_cache=False)
        found = model.generate(ids, 12, attention_mask=padding, page_size=page_size)
        assert found.shape == (3, 19)
        assert found.equal(expected)
        assert found[:, :7].equal(ids)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_the_argmax_of_forward(use_cache: bool) -> None:
    model = make_lm()
    ids, _ = prompts()
    found = model.generate(ids, 6, use_cache=use_cache)
    for _ in range(6):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert found.equal(ids)


@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_prompts_one_by_one(options: dict[str, Any], side: str) -> None:
    model = make_lm(**options)
    ids, mask = prompts()
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    together = model.generate(ids, 9, attention_mask=mask.bool())[:, 7:]
    for b in range(3):
        alone = model.generate(ids[b : b + 1, mask[b].bool()], 9)[:, -9:]
        assert together[b].equal(alone[0])


@pytest.mark.parametrize("sampling", [{}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.4}], ids=str)
def test_sampling_with_and_without_cache(sampling: dict[str, Any]) -> None:
    model = make_lm()
    ids, mask = prompts()

    def draw(seed: int, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(ids, 10, attention_mask=mask, do_sample=True, generator=generator, **sampling, **options)

    assert draw(0).equal(draw(0, use_cache=False))
    assert draw(0).equal(draw(0, page_size=3))
    assert not draw(0).equal(draw(1))


def test_top_k_of_one_is_greedy() -> None:
    model = make_lm()
    ids, _ = prompts()
    assert model.generate(ids, 8, do_sample=True, top_k=1).equal(model.generate(ids, 8))


@pytest.mark.parametrize("use_cache", [True, False])
def test_end_of_sequence(use_cache: bool) -> None:
    model = make_lm()
    ids, mask = prompts()
    free = model.generate(ids, 10, attention_mask=mask, use_cache=use_cache)[:, 7:]
    eos = int(free[1, 3])
    found = model.generate(ids, 10, attention_mask=mask, eos_token_id=eos, use_cache=use_cache)[:, 7:]
    for row, unstopped in zip(found, free, strict=True):
        where = (unstopped == eos).nonzero()
        end = int(where[0]) if len(where) else 10
        assert row[:end].equal(unstopped[:end])
        assert torch.all(row[end:] == eos)
    alone = model.generate(ids[1:2], 10, attention_mask=mask[1:2], eos_token_id=eos, use_cache=use_cache)
    assert alone.shape[1] == 7 + 1 + int((free[1] == eos).nonzero()[0])


def test_prompt_dtype_and_no_tokens() -> None:
    model = make_lm()
    ids, _ = prompts()
    assert model.generate(ids, 0).equal(ids)
    found = model.generate(ids.int(), 3)
    assert found.dtype == torch.int32
    assert found.long().equal(model.generate(ids, 3))


def test_mode_and_gradients_are_left_alone() -> None:
    torch.manual_seed(0)
    model = fnn.TransformerLM(V, 16, 32, 4, 2, dropout=0.5)
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    ids, _ = prompts()
    first = model.generate(ids, 5)
    assert first.equal(model.generate(ids, 5))  # no dropout meanwhile
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="must be at least 0"):
        model.generate(ids, -1)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    model = make_lm().to(dtype)
    ids, mask = prompts()
    found = model.generate(ids, 8, attention_mask=mask)
    assert found.shape == (3, 15)
    assert found.equal(model.generate(ids, 8, attention_mask=mask, page_size=2))
    # Rounding may break ties differently with and without cache; the first token is the same computation.
    first = model.generate(ids, 1, attention_mask=mask, use_cache=False)
    assert first.equal(found[:, :8])


def test_learned_positions_bound_the_length() -> None:
    model = make_lm(positional="learned", max_length=10)
    ids, mask = prompts()
    assert model.generate(ids, 4).shape == (3, 11)  # the last token needs no position
    with pytest.raises(ValueError, match="at most max_length = 10 tokens per row, got 11"):
        model.generate(ids, 5)
    short = mask.clone()
    short[0, :4] = 0
    assert model.generate(ids, 7, attention_mask=short).shape == (3, 14)  # padding takes no position


def test_backend_torch_generates_without_cache() -> None:
    ids, mask = prompts()
    model = make_lm(backend="torch")
    with pytest.raises(ValueError, match='use_cache must be False for a model with backend="torch"'):
        model.generate(ids, 3)
    found = model.generate(ids, 8, attention_mask=mask, use_cache=False)
    assert found.equal(make_lm().generate(ids, 8, attention_mask=mask))


def test_autocast() -> None:
    model = make_lm()
    ids, _ = prompts()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(ids, 4).shape == (3, 11)


# ------------------------------------------------------------------------------------------------ Transformer

SEQ2SEQ = [
    *({"positional": kind} for kind in KINDS),
    {"num_kv_heads": 2, "window": (4, 4), "softcap": 2.0, "sinks": True, "qk_norm": True},
]


@pytest.mark.parametrize("options", SEQ2SEQ, ids=str)
@pytest.mark.parametrize("page_size", [None, 4])
def test_transformer_cache_or_not(options: dict[str, Any], page_size: int | None) -> None:
    torch.manual_seed(0)
    model = fnn.Transformer(V, 16, 32, 4, 2, start_token_id=3, **options).eval()
    ids, mask = prompts()
    for padding in (None, mask):
        expected = model.generate(ids, 9, attention_mask=padding, use_cache=False)
        assert expected.shape == (3, 9)
        assert model.generate(ids, 9, attention_mask=padding, page_size=page_size).equal(expected)
    target = torch.full((3, 1), 3)
    for _ in range(9):
        logits = model(ids, mask, decoder_input_ids=target)
        target = torch.cat((target, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert target[:, 1:].equal(expected)


def test_transformer_generates_from_memory() -> None:
    torch.manual_seed(0)
    model = fnn.Transformer(V, 16, 32, 4, 2, memory_dim=11).eval()
    memory = torch.randn(2, 5, 11)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0]])
    call = {"memory": memory, "memory_mask": mask}
    expected = model.generate(None, 7, use_cache=False, **call)
    assert model.generate(None, 7, **call).equal(expected)
    assert model.generate(None, 7, page_size=2, **call).equal(expected)
    alone = model.generate(None, 7, memory=memory[1:, 2:4])
    assert alone.equal(expected[1:])


def test_transformer_end_and_sampling() -> None:
    torch.manual_seed(0)
    model = fnn.Transformer(V, 16, 32, 4, 2).eval()
    ids, mask = prompts()
    free = model.generate(ids, 8, attention_mask=mask)
    eos = int(free[0, 2])
    stopped = model.generate(ids[:1], 8, attention_mask=mask[:1], eos_token_id=eos)
    assert stopped.equal(free[:1, : int((free[0] == eos).nonzero()[0]) + 1])
    draws = [
        model.generate(ids, 8, do_sample=True, top_k=4, generator=torch.Generator().manual_seed(5), use_cache=c)
        for c in (True, False)
    ]
    assert draws[0].equal(draws[1])
    assert model.generate(ids, 0).shape == (3, 0)
