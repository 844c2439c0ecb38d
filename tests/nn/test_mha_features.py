"""What fastattn.nn.MultiheadAttention has beyond torch's, against attention written out step by step."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.nn import MultiheadAttention, RotaryEmbedding, alibi_slopes
from fastattn.nn.masks import mask_and_bias

from .. import eager

E, H, D = 24, 4, 6

FEATURES: dict[str, dict[str, Any]] = {
    "gqa": {"num_kv_heads": 2},
    "mqa": {"num_kv_heads": 1},
    "gqa, other widths": {"num_kv_heads": 2, "kdim": 10, "vdim": 7},
    "window": {"window": (1, 2)},
    "window, open to the right": {"window": (2, None)},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi": True},
    "rotary": {"rotary": RotaryEmbedding(D, base=100.0)},
    "interleaved partial rotary": {"rotary": RotaryEmbedding(D, interleaved=True, rotary_dim=4)},
    "sinks": {"sinks": True},
    "qk_norm": {"qk_norm": True},
    "scale": {"scale": 1.3},
    "reference": {"backend": "reference"},
    "bias_kv and alibi": {"alibi": True, "add_bias_kv": True},
    "bias_kv, zero_attn, window, gqa": {
        "window": (1, 0),
        "num_kv_heads": 2,
        "add_bias_kv": True,
        "add_zero_attn": True,
    },
    "everything": {
        "num_kv_heads": 2,
        "window": (3, 1),
        "softcap": 2.0,
        "alibi": True,
        "rotary": RotaryEmbedding(D),
        "sinks": True,
        "qk_norm": True,
        "scale": 0.9,
    },
}


def make_module(features: dict[str, Any], **more: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    module = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **features, **more)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return module


def rotate(x: Tensor, rotary: RotaryEmbedding, positions: Tensor) -> Tensor:
    """Pair by pair, as complex numbers."""
    columns, half = list(x.unbind(-1)), rotary.rotary_dim // 2
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if rotary.interleaved else (pair, pair + half)
        angle = positions.double() * rotary.base ** (-2 * pair / rotary.rotary_dim)
        turned = torch.complex(columns[a], columns[b]) * torch.polar(torch.ones_like(angle), angle)
        columns[a], columns[b] = turned.real, turned.imag
    return torch.stack(columns, dim=-1)


def written_out(
    module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """The module's output, mask (batch, 1, seqlen_q, seqlen_k), True = attend."""
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    width = module.num_kv_heads * D
    sizes = [E, width, width]
    if module.in_proj_weight is None:
        weights = [getattr(module, name) for name in names]
    else:
        weights = list(module.in_proj_weight.split(sizes))
    q, k, v = (
        (x @ w.T + b).unflatten(-1, (-1, D)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, module.in_proj_bias.split(sizes), strict=True)
    )
    if module.q_norm is not None:
        q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.q_norm.weight
        k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.k_norm.weight
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    if module.rotary is not None:
        q, k = (rotate(x, module.rotary, torch.arange(x.shape[2])) for x in (q, k))
    distance = torch.arange(seqlen_q)[:, None] - torch.arange(seqlen_k)
    left, right = module.window or (None, None)
    right = 0 if causal else right
    visible = torch.ones(query.shape[0], 1, seqlen_q, seqlen_k, dtype=torch.bool) if mask is None else mask
    visible = visible if left is None else visible & (distance <= left)
    visible = visible if right is None else visible & (distance >= -right)
    penalty = torch.zeros(H, seqlen_q, seqlen_k, dtype=torch.float64)
    if module.alibi_slopes is not None:
        penalty = -alibi_slopes(H).double()[:, None, None] * distance.abs()
    for extra_k, extra_v in (
        (module.bias_k, module.bias_v),
        (0.0, 0.0) if module.add_zero_attn else (None, None),
    ):
        if extra_k is None:
            continue
        for extra, old in ((extra_k, "k"), (extra_v, "v")):
            x = k if old == "k" else v
            row = torch.zeros_like(x[:, :, :1])
            if isinstance(extra, Tensor):
                row = row + extra.view(1, -1, 1, D)
            x = torch.cat((x, row), dim=2)
            k, v = (x, v) if old == "k" else (k, x)
        visible = torch.cat((visible, torch.ones_like(visible[..., :1])), dim=-1)
        penalty = torch.cat((penalty, torch.zeros_like(penalty[..., :1])), dim=-1)
    out, _ = eager.dense(
        *(q, k, v), mask=visible, bias=penalty, softcap=module.softcap, sinks=module.sinks, scale=module.scale
    )
    return out.transpose(1, 2).flatten(2) @ module.out_proj.weight.T + module.out_proj.bias


def assert_same_gradients(a: Tensor, b: Tensor, leaves: list[Tensor]) -> None:
    cotangent = torch.randn(a.shape, dtype=a.dtype, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad(a, leaves, cotangent, retain_graph=True)
    expected = torch.autograd.grad(b, leaves, cotangent, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FEATURES)
def test_against_attention_written_out(name: str) -> None:
    module = make_module(FEATURES[name])
    query = torch.randn(2, 7, E, dtype=torch.float64, requires_grad=True)
    key, value = query, query
    if module.kdim != E:
        key, value = (torch.randn(2, 7, width, dtype=torch.float64) for width in (module.kdim, module.vdim))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, :2] = True
    for causal in (False, True):
        for mask in (None, padding):
            visible = None if mask is None else ~mask[:, None, None].expand(2, 1, 7, 7)
            expected = written_out(module, query, key, value, visible, causal)
            call = {"key_padding_mask": mask, "is_causal": causal}
            plain, _ = module(query, key, value, need_weights=False, **call)
            weighted, weights = module(query, key, value, **call)
            torch.testing.assert_close(plain, expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(weighted, expected, rtol=1e-9, atol=1e-9)
            assert weights.shape[-1] == 7 + (module.bias_k is not None) + module.add_zero_attn
    assert_same_gradients(plain, expected, [query, *module.parameters()])


@pytest.mark.parametrize("name", ["window", "alibi", "gqa"])
def test_cross_attention_counts_from_the_first_key(name: str) -> None:
    module = make_module(FEATURES[name])
    query, memory = torch.randn(2, 4, E, dtype=torch.float64), torch.randn(2, 9, E, dtype=torch.float64)
    found, _ = module(query, memory, memory, need_weights=False)
    torch.testing.assert_close(found, written_out(module, query, memory, memory, None, False))


@pytest.mark.parametrize("name", ["gqa", "window", "alibi", "bias_kv and alibi", "qk_norm", "rotary", "scale"])
def test_backend_torch_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module(FEATURES[name])
    rival = copy.deepcopy(module)
    rival.backend = "torch"
    calls = []
    sdpa = torch.ops.aten.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.ops.aten, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or sdpa(*a, **k)
    )
    x = torch.randn(2, 7, E, dtype=torch.float64)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, -2:] = True
    floats = torch.zeros(2, 7, dtype=torch.float64).masked_fill(padding, -3.0)
    for call in (
        {},
        {"is_causal": True},
        {"key_padding_mask": padding, "is_causal": True},
        {"key_padding_mask": floats},
    ):
        expected, _ = module(x, x, x, need_weights=False, **call)
        before = len(calls)
        found, _ = rival(x, x, x, need_weights=False, **call)
        assert len(calls) == before + 1
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_positions_of_rotary_only_matter_by_their_differences() -> None:
    module = make_module(FEATURES["rotary"])
    x = torch.randn(2, 5, E, dtype=torch.float64)
    expected, _ = module(x, x, x, need_weights=False)
    shifted, _ = module(x, x, x, need_weights=False, positions=torch.arange(5) + torch.tensor([[70], [900]]))
    torch.testing.assert_close(shifted, expected, rtol=1e-5, atol=1e-5)
    spread, _ = module(x, x, x, need_weights=False, positions=torch.arange(5) * 3)
    assert (spread - expected).abs().max() > 1e-2


def test_packed_and_separate_inputs_agree() -> None:
    """One tensor thrice is projected in one step, equal tensors are not."""
    module = make_module(FEATURES["gqa"])
    x = torch.randn(2, 5, E, dtype=torch.float64)
    expected, _ = module(x, x, x)
    y = x.clone()
    for inputs in ((x, y, y), (x, y, x.clone()), (x, x, y)):
        torch.testing.assert_close(module(*inputs)[0], expected)


def test_casting_rounds_neither_slopes_nor_angles() -> None:
    module = MultiheadAttention(30, 5, alibi=True, rotary=RotaryEmbedding(6)).to(torch.bfloat16)
    assert module.alibi_slopes.dtype == torch.float32
    assert torch.equal(module.alibi_slopes, alibi_slopes(5))
    assert module.rotary.tables(9).cos.dtype == torch.float32
    assert "alibi_slopes" not in module.state_dict()
    empty = MultiheadAttention(30, 5, alibi=True, device="meta").to_empty(device="cpu")
    assert torch.equal(empty.alibi_slopes, alibi_slopes(5))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same(copier: Any) -> None:
    module = make_module(FEATURES["everything"])
    x = torch.randn(2, 5, E, dtype=torch.float64)
    expected, _ = module(x, x, x)  # the first call fills the tables of the rotary embedding
    twin = copier(module)
    assert twin.out_proj.weight is not module.out_proj.weight
    torch.testing.assert_close(twin(x, x, x)[0], expected, rtol=0, atol=0)
    assert not twin._qkv_same_embed_dim


def test_extras_in_the_state_dict() -> None:
    module = make_module(FEATURES["everything"])
    extra = set(module.state_dict()) - set(torch.nn.MultiheadAttention(E, H).state_dict())
    assert extra == {"sinks", "q_norm.weight", "k_norm.weight"}
    make_module(FEATURES["everything"]).load_state_dict(module.state_dict())


def test_repr_shows_what_is_not_the_default() -> None:
    assert repr(MultiheadAttention(E, H)).startswith("MultiheadAttention(\n  embed_dim=24, num_heads=4\n")
    module = MultiheadAttention(E, H, 0.1, False, kdim=10, batch_first=True, num_kv_heads=2, window=(3, 0), alibi=True)
    assert module.extra_repr() == (
        "embed_dim=24, num_heads=4, dropout=0.1, bias=False, kdim=10, batch_first=True, num_kv_heads=2, "
        "window=(3, 0), alibi=True"
    )
    module = MultiheadAttention(E, H, 0.0, True, True, True, vdim=7, sinks=True, qk_norm=True, softcap=2.0, scale=0.5)
    module.backend = "reference"
    assert module.extra_repr() == (
        "embed_dim=24, num_heads=4, add_bias_kv=True, add_zero_attn=True, vdim=7, softcap=2.0, sinks=True, "
        "qk_norm=True, scale=0.5, backend='reference'"
    )


# ------------------------------------------------------------------------------------------------------ masks


def brute_force(padding: Tensor | None, pattern: Tensor | None, total: Tensor) -> Tensor:
    """What torch adds to the scores, on top of `total` (batch, heads, seqlen_q, seqlen_k)."""
    batch, heads, seqlen_q, seqlen_k = total.shape
    shapes = {
        1: (batch, 1, 1, seqlen_k),
        2: (1, 1, seqlen_q, seqlen_k),
        3: (batch, heads, seqlen_q, seqlen_k),
    }
    for mask, shape in ((padding, shapes[1]), (pattern, shapes[2 if pattern is None else pattern.ndim])):
        if mask is not None:
            blocked = torch.zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
            total = total + blocked.view(shape)
    return total


MASKS = [
    # padding, pattern, elements of mask, elements of bias
    (None, None, 0, 0),
    ("bool", None, 3 * 7, 0),
    ("float", None, 0, 3 * 7),
    (None, "bool 2", 5 * 7, 0),
    (None, "float 3", 0, 3 * 4 * 5 * 7),
    ("bool", "bool 2", 3 * 7, 5 * 7),
    ("bool", "float 2", 3 * 7, 5 * 7),
    ("float", "bool 2", 5 * 7, 3 * 7),
    ("bool", "bool 3", 3 * 4 * 5 * 7, 0),
    ("float", "float 2", 0, 3 * 5 * 7),
]


@pytest.mark.parametrize(("padding", "pattern", "mask_size", "bias_size"), MASKS, ids=str)
def test_masks_stay_as_small_as_they_came(
    padding: str | None, pattern: str | None, mask_size: int, bias_size: int
) -> None:
    torch.manual_seed(0)
    batch, heads, sizes = 3, 4, (5, 7)

    def make(kind: str, shape: tuple[int, ...]) -> Tensor:
        blocked = torch.rand(shape) < 0.4
        return blocked if kind == "bool" else torch.randn(shape).masked_fill(blocked, -torch.inf)

    given_padding = None if padding is None else make(padding, (batch, 7))
    given_pattern = None
    if pattern is not None:
        kind, dims = pattern.split()
        given_pattern = make(kind, sizes if dims == "2" else (batch * heads, *sizes))
    mask, bias = mask_and_bias(given_padding, given_pattern, heads, torch.float32)
    assert (0 if mask is None else mask.numel(), 0 if bias is None else bias.numel()) == (
        mask_size,
        bias_size,
    )
    nothing = torch.zeros(batch, heads, *sizes)
    total = nothing if bias is None else nothing + bias
    total = total if mask is None else total.masked_fill(~mask, -torch.inf)
    assert torch.equal(total, brute_force(given_padding, given_pattern, nothing))
