"""Modules built on the meta device, or emptied, and then loaded compute what modules built on the CPU do.

What a module derives from its sizes (ALiBi's slopes, tables of positions) is in no state_dict: it must not stay behind.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn.nn as fnn

E, H = 12, 3


def attention(**features: Any) -> fnn.MultiheadAttention:
    return fnn.MultiheadAttention(E, H, batch_first=True, **features)


def language_model(positional: str) -> fnn.TransformerLM:
    return fnn.TransformerLM(11, E, 16, H, 2, positional=positional)


def call_attention(module: nn.Module) -> Tensor:
    x = torch.linspace(-1, 1, 2 * 5 * E).view(2, 5, E)
    return module(x, x, x)[0]


def call_model(module: nn.Module) -> Tensor:
    return module(torch.arange(10).view(2, 5))


def call_encoding(module: nn.Module) -> Tensor:
    return module(torch.ones(2, 5, E))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "alibi": (lambda: attention(alibi=True), call_attention),
    "every feature": (
        lambda: attention(
            alibi=True, rotary=fnn.RotaryEmbedding(4), window=(2, 1), softcap=4.0, sinks=True, qk_norm=True
        ),
        call_attention,
    ),
    "replaced": (
        lambda: fnn.replace_attention(
            nn.ModuleDict({"a": nn.MultiheadAttention(E, H, batch_first=True)}), alibi=True, sinks=True
        ),
        lambda module: call_attention(module["a"]),
    ),
    "add_bias_kv": (lambda: attention(alibi=True, add_bias_kv=True, add_zero_attn=True), call_attention),
    **{
        f"language model, {kind}": (lambda kind=kind: language_model(kind), call_model)
        for kind in ("alibi", "rotary", "learned", "sinusoidal")
    },
    "transformer": (lambda: fnn.Transformer(11, E, 16, H, 1, positional="alibi", memory_dim=5), call_model),
    "sinusoidal": (lambda: fnn.SinusoidalPositionalEncoding(E), call_encoding),
    "learned": (lambda: fnn.LearnedPositionalEncoding(8, E), call_encoding),
    "rotary": (
        lambda: fnn.RotaryEmbedding(E),
        lambda module: module(torch.ones(2, 1, 5, E)),
    ),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]:
    return CASES[request.param]


def loaded_on_meta(build: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        module = build()
    assert all(p.is_meta for p in module.parameters())
    module.load_state_dict(state, assign=True)
    return module


def emptied(build: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        module = build()
    module.to_empty(device="cpu").load_state_dict(state)
    return module


@pytest.mark.parametrize("load", [loaded_on_meta, emptied])
def test_loaded_module_computes_the_same(case: Any, load: Any) -> None:
    build, call = case
    torch.manual_seed(0)
    module = build().eval()
    twin = load(build, module.state_dict()).eval()
    with torch.no_grad():
        assert torch.equal(call(twin), call(module))
        again = copy.deepcopy(twin)
        assert torch.equal(call(again), call(module))


def test_a_call_on_meta_leaves_nothing_behind(case: Any) -> None:
    build, call = case
    module = build().eval()
    with torch.device("meta"):
        twin = build().eval()
        assert call(twin).is_meta
    twin.load_state_dict(module.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(call(twin), call(module))


def test_no_module_has_buffers(case: Any) -> None:
    """Every way to move, cast, empty or load a module would have to treat them apart."""
    assert not list(case[0]().buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casts_and_copies_keep_the_slopes(dtype: torch.dtype) -> None:
    module = attention(alibi=True)
    for other in (module.to(dtype), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other.alibi_slopes, fnn.alibi_slopes(H))
