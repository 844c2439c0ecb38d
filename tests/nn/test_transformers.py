"""TransformerLM and Transformer: what may influence what, and that they learn."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn.nn as fnn

V = 20
KINDS = ["rotary", "learned", "sinusoidal", "alibi"]

LM_OPTIONS = [
    *({"positional": kind} for kind in KINDS),
    {"num_kv_heads": 2, "window": (3, 0), "softcap": 3.0, "sinks": True, "qk_norm": True, "scale": 0.4},
    {"backend": "torch"},
]


def make_lm(**options: Any) -> fnn.TransformerLM:
    torch.manual_seed(0)
    return fnn.TransformerLM(V, 16, 24, 4, 2, **{"max_length": 12, **options}).eval()


def make_transformer(**options: Any) -> fnn.Transformer:
    torch.manual_seed(0)
    return fnn.Transformer(V, 16, 24, 4, 2, **{"max_length": 12, **options}).eval()


def pad(ids: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Ids between random tokens, and the mask that says so."""
    batch, seqlen = ids.shape
    padded = torch.cat((torch.randint(V, (batch, left)), ids, torch.randint(V, (batch, right))), dim=1)
    mask = torch.zeros(batch, left + seqlen + right, dtype=torch.int64)
    mask[:, left : left + seqlen] = 1
    return padded, mask


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- TransformerLM


@pytest.mark.parametrize("options", LM_OPTIONS, ids=str)
def test_lm_is_causal(options: dict[str, Any]) -> None:
    model = make_lm(**options)
    ids = torch.randint(V, (2, 9))
    logits = model(ids)
    assert logits.shape == (2, 9, V)
    changed = ids.clone()
    changed[:, 6] = (ids[:, 6] + 1) % V
    other = model(changed)
    assert_equal(other[:, :6], logits[:, :6])
    assert (other[:, 6:] - logits[:, 6:]).abs().amax(dim=-1).min() > 1e-4


@pytest.mark.parametrize("options", LM_OPTIONS, ids=str)
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 1)])
def test_lm_padding_does_not_matter(options: dict[str, Any], left: int, right: int) -> None:
    model = make_lm(**options)
    ids = torch.randint(V, (2, 7))
    padded, mask = pad(ids, left, right)
    expected = model(ids)
    assert_equal(model(padded, mask)[:, left : left + 7], expected)
    assert_equal(model(padded.int(), mask.bool())[:, left : left + 7], expected)


def test_lm_knows_positions() -> None:
    """The same tokens in another order give another last logit; without positions they would not."""
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    swapped = torch.tensor([[2, 1, 3, 4, 5]])
    for kind in KINDS:
        torch.manual_seed(0)
        model = fnn.TransformerLM(V, 16, 24, 4, 1, positional=kind).eval()
        assert (model(ids)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-4, kind


def test_lm_rows_of_nothing_but_padding_are_finite() -> None:
    model = make_lm()
    ids = torch.randint(V, (2, 5))
    mask = torch.tensor([[1] * 5, [0] * 5])
    logits = model(ids, mask)
    assert_equal(logits[:1], model(ids[:1]))
    assert logits.isfinite().all()


def test_lm_on_torchs_attention_is_the_same_model() -> None:
    ids = torch.randint(V, (2, 9))
    ours, theirs = make_lm(), make_lm(backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    for model in (ours, theirs):
        nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert_equal(ours(ids), theirs(ids))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_lm_dropout_only_in_training() -> None:
    model = make_lm(dropout=0.5)
    ids = torch.randint(V, (2, 5))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_lm_in_other_dtypes(dtype: torch.dtype) -> None:
    ids = torch.randint(V, (2, 5))
    expected = make_lm(qk_norm=True, sinks=True)(ids)
    logits = make_lm(qk_norm=True, sinks=True).to(dtype)(ids)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, rtol=5e-2, atol=5e-2)


def test_lm_empty_sequence() -> None:
    assert make_lm()(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, V)


@pytest.mark.parametrize("make", [make_lm, make_transformer])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_and_checkpoints(make: Any, copier: Any) -> None:
    model = make(positional="rotary", num_kv_heads=2, sinks=True)
    ids = torch.randint(V, (2, 5))
    twin = copier(model)
    assert torch.equal(twin(ids), model(ids))
    torch.manual_seed(1)
    fresh = type(model)(V, 16, 24, 4, 2, positional="rotary", num_kv_heads=2, sinks=True).eval()
    assert not torch.equal(fresh(ids), model(ids))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids), model(ids))


@pytest.mark.parametrize("options", [{}, {"positional": "alibi", "num_kv_heads": 1}], ids=str)
def test_lm_learns(options: dict[str, Any]) -> None:
    """A repeated pattern, by heart."""
    torch.manual_seed(0)
    model = fnn.TransformerLM(V, 32, 64, 4, 1, dropout=0.0, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]).repeat(3)[None]
    for _ in range(80):
        loss = nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert model.generate(ids[:, :10], 14).equal(ids)


# ------------------------------------------------------------------------------------------------ Transformer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 1)])
def test_transformer_padding_does_not_matter(kind: str, left: int, right: int) -> None:
    model = make_transformer(positional=kind)
    source, target = torch.randint(V, (2, 6)), torch.randint(V, (2, 5))
    expected = model(source, decoder_input_ids=target)
    assert expected.shape == (2, 5, V)
    padded_source, source_mask = pad(source, left, right)
    padded_target, target_mask = pad(target, right, left)
    found = model(padded_source, source_mask, padded_target, target_mask)
    assert_equal(found[:, right : right + 5], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_transformer_directions(kind: str) -> None:
    """Every source token matters to every output, later targets do not."""
    model = make_transformer(positional=kind)
    source, target = torch.randint(V, (1, 6)), torch.randint(V, (1, 5))
    expected = model(source, decoder_input_ids=target)
    for i in range(6):
        changed = source.clone()
        changed[0, i] = (changed[0, i] + 1) % V
        assert (model(changed, decoder_input_ids=target) - expected).abs().amax(dim=-1).min() > 1e-6
    changed = target.clone()
    changed[0, 3] = (changed[0, 3] + 1) % V
    found = model(source, decoder_input_ids=changed)
    assert_equal(found[:, :3], expected[:, :3])
    assert (found[:, 3:] - expected[:, 3:]).abs().amax(dim=-1).min() > 1e-6


def test_positions_are_positions_and_not_token_ids() -> None:
    """Two layouts of the same tokens differ, and a vocabulary larger than max_length is no problem."""
    torch.manual_seed(0)
    model = fnn.Transformer(1000, 16, 24, 4, 1, max_length=6).eval()
    assert model.embedding.positions.weight.shape == (6, 16)
    a, b = torch.tensor([[999, 5, 7, 7]]), torch.tensor([[5, 999, 7, 7]])
    target = torch.tensor([[1, 2]])
    assert (model(a, decoder_input_ids=target) - model(b, decoder_input_ids=target)).abs().max() > 1e-4


def test_hidden_dim_is_the_width_of_the_feed_forward() -> None:
    model = make_transformer()
    widths = {block.feed_forward[0].out_features for block in (*model.encoder, *model.decoder)}
    assert widths == {24}
    assert (len(model.encoder), len(model.decoder)) == (2, 2)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [[9, 1, 2, 3, 4]]),
        ([[0, 0, 1, 1, 1]], [[9, 9, 9, 3, 4]]),
        ([[1, 1, 1, 0, 0]], [[9, 1, 2, 3, 9]]),
    ],
    ids=["none", "left", "right"],
)
def test_shift_right(mask: list[list[int]] | None, expected: list[list[int]]) -> None:
    model = make_transformer(start_token_id=9)
    found = model.shift_right(torch.tensor([[1, 2, 3, 4, 5]]), None if mask is None else torch.tensor(mask))
    assert found.tolist() == expected


def test_decoder_inputs_default_to_the_shifted_source() -> None:
    model = make_transformer(start_token_id=9)
    ids = torch.randint(V, (2, 6))
    assert_equal(model(ids), model(ids, decoder_input_ids=model.shift_right(ids)))
    padded, mask = pad(ids, 3, 2)
    assert_equal(model(padded, mask)[:, 3:9], model(ids))


@pytest.mark.parametrize("memory_dim", [None, 7, 40])
def test_memory_of_another_modality(memory_dim: int | None) -> None:
    model = make_transformer(memory_dim=memory_dim)
    memory = torch.randn(2, 5, 16 if memory_dim is None else memory_dim)
    target = torch.randint(V, (2, 4))
    expected = model(None, decoder_input_ids=target, memory=memory)
    assert expected.shape == (2, 4, V)
    junk = torch.full_like(memory[:, :2], 100.0)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]] * 2)
    longer = torch.cat((junk, memory), dim=1)
    assert_equal(model(None, decoder_input_ids=target, memory=longer, memory_mask=mask), expected)
    source = torch.randint(V, (2, 4))
    assert_equal(model(source, memory=memory), model(None, decoder_input_ids=model.shift_right(source), memory=memory))
    assert (model(source, decoder_input_ids=target) - expected).abs().max() > 1e-4  # text still goes to the encoder
    expected.sum().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == {name for name, _ in model.named_parameters() if name.startswith("encoder")}


def test_transformer_learns_to_reverse() -> None:
    torch.manual_seed(0)
    model = fnn.Transformer(8, 32, 64, 4, 1, dropout=0.0, max_length=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        source = torch.randint(1, 8, (32, 5))
        target = source.flip(1)
        logits = model(source, decoder_input_ids=model.shift_right(target))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    source = torch.randint(1, 8, (50, 5))
    assert (model.generate(source, 5) == source.flip(1)).all(dim=1).double().mean() > 0.9
