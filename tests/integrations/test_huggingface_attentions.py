"""`output_attentions=True` gives the probabilities that eager attention gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.integrations import huggingface
from fastattn.integrations.huggingface import attention_forward
from tests.integrations import huggingface_models as models
from tests.integrations.huggingface_models import VERSION, build, tokens

huggingface.register()

FIELDS = ("attentions", "decoder_attentions", "encoder_attentions", "cross_attentions")
# GPT-2 and BERT of transformers 4 do not pass it on, or know their own implementations only.
NAMES = [
    "Llama",
    "Mistral",
    "Gemma 2",
    "gpt-oss",
    "BART",
    *(["GPT-2", "BERT", "T5", "ViT"] if VERSION >= (5, 0) else []),
]


def attentions(name: str, implementation: str, side: str, **changes: Any) -> dict[str, tuple[Tensor, ...]]:
    """Those of each kind that the model has, by layer, and the logits."""
    inputs = {key: x for key, x in models.inputs(name, side).items() if key != "labels"}
    if name in ("BART", "T5"):
        inputs["decoder_input_ids"] = models.tokens("none", 7)["input_ids"]
    output = build(name, implementation, **changes)(**inputs, output_attentions=True)
    found = {field: getattr(output, field, None) for field in FIELDS}
    return {"logits": (output.logits,)} | {field: x for field, x in found.items() if x}


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_are_those_of_eager(name: str, side: str) -> None:
    expected, found = (attentions(name, implementation, side) for implementation in ("eager", "fastattn"))
    assert found.keys() == expected.keys()
    assert len(found) == (4 if name in ("BART", "T5") else 2)
    real = models.padding_mask(side) == 1
    for field in found.keys() - {"logits"}:
        assert len(found[field]) == len(expected[field]) == 2
        for x, y in zip(found[field], expected[field], strict=True):
            assert x.shape == y.shape
            queries = real if x.shape[2] == real.shape[1] else torch.ones(x.shape[0], x.shape[2], dtype=torch.bool)
            rows = queries[:, None].expand(x.shape[:3])
            torch.testing.assert_close(x[rows], y[rows], rtol=1e-4, atol=1e-5)


def test_are_differentiable() -> None:
    gradients = []
    for implementation in ("eager", "fastattn"):
        model = build("Llama", implementation)
        output = model(**tokens("right"), output_attentions=True)
        sum(x.square().sum() for x in output.attentions).backward()  # type: ignore[union-attr]
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_of_generate() -> None:
    """The steps with a cache; a static one has keys that are not there yet, with probability 0."""
    for options in ({}, {"cache_implementation": "static"}):
        eager, found = (
            build("Llama", implementation).generate(
                **tokens("none"),
                **options,
                max_new_tokens=3,
                do_sample=False,
                output_attentions=True,
                return_dict_in_generate=True,
            )
            for implementation in ("eager", "fastattn")
        )
        assert torch.equal(eager.sequences, found.sequences)
        for step, expected in zip(found.attentions, eager.attentions, strict=True):
            for x, y in zip(step, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_of_packed_sequences() -> None:
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    inputs = {"input_ids": tokens("none")["input_ids"][:1], "position_ids": positions, "use_cache": False}
    eager, found = (
        build("Llama", implementation)(**inputs, output_attentions=True) for implementation in ("eager", "fastattn")
    )
    torch.testing.assert_close(found.logits, eager.logits, rtol=1e-4, atol=1e-5)
    for x, y in zip(found.attentions, eager.attentions, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("each_query", [False, True])
def test_multiply_the_values_after_dropout(each_query: bool) -> None:
    """As in eager attention, which returns what it multiplies the values with."""
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64).unbind()
    k, v = k[:, :2], v[:, :2]
    sinks = torch.randn(2, 4, 9, 1, dtype=torch.float64) if each_query else torch.randn(4, dtype=torch.float64)
    module = nn.Module().train()
    call = {"dropout": 0.4, "sinks": sinks, "softcap": 3.0, "is_causal": True}
    torch.manual_seed(1)
    out, weights = attention_forward(module, q, k, v, None, **call, output_attentions=True)
    assert weights is not None
    assert weights.shape == (2, 4, 9, 9)
    assert weights.dtype == q.dtype
    dropped = (weights[:, :, 1:, 0] == 0).double().mean()
    assert 0.1 < dropped < 0.7
    torch.testing.assert_close((weights @ v.repeat_interleave(2, 1)).transpose(1, 2), out)
    torch.manual_seed(1)
    assert torch.equal(attention_forward(module, q, k, v, None, **call)[0], out)  # asking changes nothing
    _, whole = attention_forward(module.eval(), q, k, v, None, **call, output_attentions=True)
    kept = weights != 0
    torch.testing.assert_close(weights[kept] * 0.6, whole[kept])


def test_are_not_made_unless_asked_for() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    for asked in ({}, {"output_attentions": False}, {"output_attentions": None}):
        out, weights = attention_forward(nn.Module(), q, k, v, None, is_causal=False, **asked)
        assert weights is None
        assert torch.equal(out, fastattn.attention(q, k, v).transpose(1, 2))


@pytest.mark.skipif(VERSION >= (5, 0), reason="of GPT-2 in transformers 4")
def test_that_are_kept_from_the_interface() -> None:
    """It hears nothing of them; the model returns None for each, and no numbers."""
    output = build("GPT-2", "fastattn")(**tokens("none"), output_attentions=True)
    assert output.attentions == (None, None)
