"""The modules under torch.compile, without a graph break.

One case runs the code that the compiler writes; the others its graphs, forward and backward, in eager mode
("aot_eager"), which shows the same about our modules in a fraction of the time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastattn.nn as fnn

ROTARY = fnn.RotaryEmbedding(4)
FEATURES = {
    "num_kv_heads": 2,
    "window": (3, 0),
    "alibi": True,
    "rotary": ROTARY,
    "sinks": True,
    "qk_norm": True,
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("features", "compiler"),
    [
        ({}, "aot_eager"),
        (FEATURES, "inductor"),
    ],
    ids=["plain", "features"],
)
def test_attention(features: dict[str, Any], compiler: str) -> None:
    torch.manual_seed(0)
    module = fnn.MultiheadAttention(16, 4, batch_first=True, **features)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    results = []
    x = torch.randn(2, 6, 16)
    for call in (module, torch.compile(module, fullgraph=True, backend=compiler)):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        out, _ = call(leaf, leaf, leaf, padding, need_weights=False, is_causal=True)
        out.square().sum().backward()
        results.append([out, leaf.grad, *(p.grad.clone() for p in module.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_language_model_with_changing_lengths() -> None:
    torch.manual_seed(0)
    model = fnn.TransformerLM(11, 16, 24, 4, 1, dropout=0.0)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (5, 9):
        ids = torch.randint(11, (2, seqlen))
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        losses = []
        for call in (model, compiled):
            model.zero_grad()
            loss = nn.functional.cross_entropy(call(ids, mask).flatten(0, 1), ids.flatten())
            loss.backward()
            losses.append([loss, *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


def test_learned_positions_with_padding() -> None:
    torch.manual_seed(0)
    model = fnn.TransformerLM(11, 16, 24, 4, 1, positional="learned", backend="torch").eval()
    ids, mask = torch.randint(11, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[1, :3] = 0
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, mask)
        torch.testing.assert_close(found[mask.bool()], model(ids, mask)[mask.bool()], rtol=1e-4, atol=1e-5)


def test_meta_tensors() -> None:
    """Shapes without memory, and without anything left behind for real tensors."""
    rotary = fnn.RotaryEmbedding(4)
    module = fnn.MultiheadAttention(16, 4, batch_first=True, rotary=rotary, device="meta")
    x = torch.randn(2, 6, 16, device="meta")
    assert module(x, x, x, need_weights=False)[0].shape == (2, 6, 16)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        fake = fnn.MultiheadAttention(16, 4, batch_first=True, rotary=rotary)
        y = torch.randn(2, 6, 16)
        assert fake(y, y, y, need_weights=False)[0].shape == (2, 6, 16)
    assert type(rotary.tables(6).cos) is torch.Tensor
