"""fastattn.integrations.flash_attn against a plain float64 evaluation in flash-attn's layouts.

The yardstick is written from flash-attn's documentation, and shares nothing with fastattn.
"""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn.integrations.flash_attn as fa
from fastattn import attention, merge_states
from fastattn.integrations.flash_attn.rotary import apply_rotary_emb_func

DOUBLE = torch.float64


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence: q (seqlen_q, nheads, headdim), k and v (seqlen_k, nheads_k, headdim) -> out and lse (nheads, ...).

    seen (seqlen_k,): keys that exist. alibi_slopes (nheads,).
    """
    (seqlen_q, heads, head_dim), seqlen_k = q.shape, k.shape[0]
    outs, lses = [], []
    for h in range(heads):
        own = h // (heads // k.shape[1])
        scores = q[:, h] @ k[:, own].T * (softmax_scale if softmax_scale is not None else 1 / math.sqrt(head_dim))
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - torch.arange(seqlen_k)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[h] * distance.abs()
        hidden = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
        hidden |= (distance < 0) if causal else hidden
        hidden |= (distance > window_size[0]) if window_size[0] >= 0 else hidden
        hidden |= (-distance > window_size[1]) if window_size[1] >= 0 else hidden
        hidden |= hidden if seen is None else ~seen
        empty = hidden.all(dim=1)
        lse = torch.logsumexp(scores.masked_fill(hidden, -torch.inf).masked_fill(empty[:, None], 0.0), dim=1)
        probs = torch.exp(scores - lse[:, None]).masked_fill(hidden, 0.0)
        outs.append(probs @ v[:, own])
        lses.append(lse.masked_fill(empty, torch.inf))
    return torch.stack(outs, dim=1), torch.stack(lses)


def batched(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None = None, **options: Any) -> list[Tensor]:
    """(batch_size, seqlen, nheads, headdim) -> [out, lse (batch_size, nheads, seqlen_q)]."""
    rows = [
        plain(
            q[b],
            k[b],
            v[b],
            alibi_slopes=None if alibi_slopes is None else alibi_slopes.expand(len(q), -1)[b],
            **options,
        )
        for b in range(len(q))
    ]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def floats(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"softmax_scale": 0.3},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "open to the right": {"window_size": (1, -1)},
    "causal window": {"causal": True, "window_size": (3, 5)},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "alibi of each sequence": {"alibi_slopes": torch.rand(2, 4), "causal": True},
    "all": {"causal": True, "window_size": (4, 0), "softcap": 2.0, "alibi_slopes": torch.rand(4), "softmax_scale": 0.2},
}
LENGTHS = [(5, 5), (3, 9), (9, 3), (1, 7), (0, 4), (4, 0)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_dense(name: str, lengths: tuple[int, int]) -> None:
    q, k, v = floats(2, lengths[0], 4, 8), floats(2, lengths[1], 2, 8), floats(2, lengths[1], 2, 8)
    leaves, twins = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    out, lse, s_dmask = fa.flash_attn_func(*leaves, **OPTIONS[name], return_attn_probs=True)
    assert torch.equal(out, fa.flash_attn_func(*leaves, **OPTIONS[name]))
    assert out.is_contiguous()
    assert (lse.dtype, s_dmask.numel()) == (DOUBLE, 0)
    want = batched(*twins, **OPTIONS[name])
    torch.testing.assert_close([out, lse], want)
    dout = floats(*out.shape)
    for a, b in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(want[0], twins, dout), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    q, k, v = (floats(2, 6, 4, 16, dtype=dtype) for _ in range(3))
    out, lse, _ = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    want = batched(q.double(), k.double(), v.double(), causal=True)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}[dtype]
    torch.testing.assert_close(out.double(), want[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-4, atol=1e-4)


def test_packed() -> None:
    q, kv, qkv = floats(2, 5, 4, 8), floats(2, 7, 2, 2, 8), floats(2, 5, 3, 4, 8).requires_grad_()
    found = fa.flash_attn_kvpacked_func(q, kv, causal=True, softcap=2.0, return_attn_probs=True)
    torch.testing.assert_close(list(found[:2]), batched(q, *kv.unbind(2), causal=True, softcap=2.0))
    out = fa.flash_attn_qkvpacked_func(qkv, window_size=(1, 1))
    torch.testing.assert_close(out, batched(*qkv.unbind(2), window_size=(1, 1))[0])
    (grad,) = torch.autograd.grad(out.square().sum(), qkv)
    (want,) = torch.autograd.grad(batched(*qkv.unbind(2), window_size=(1, 1))[0].square().sum(), qkv)
    torch.testing.assert_close(grad, want)


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def ragged(q: Tensor, k: Tensor, v: Tensor, lengths: list[tuple[int, int]], **options: Any) -> list[Tensor]:
    rows, cols = ([n[i] for n in lengths] for i in (0, 1))
    slopes = options.pop("alibi_slopes", None)
    parts = zip(q.split(rows), k.split(cols), v.split(cols), strict=True)
    results = []
    for b, part in enumerate(parts):
        own = None if slopes is None else slopes.expand(len(lengths), -1)[b]
        results.append(plain(*part, alibi_slopes=own, **options))
    return [torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results], dim=1)]


@pytest.mark.parametrize("name", OPTIONS)
def test_varlen(name: str) -> None:
    lengths = [(3, 5), (6, 2)]
    q, k, v = floats(9, 4, 8), floats(7, 2, 8), floats(7, 2, 8)
    cu = [cumulative([n[i] for n in lengths]) for i in (0, 1)]
    leaves, twins = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    out, lse, _ = fa.flash_attn_varlen_func(*leaves, *cu, 6, 5, **OPTIONS[name], return_attn_probs=True)
    want = ragged(*twins, lengths, **OPTIONS[name])
    torch.testing.assert_close([out, lse], want)
    dout = floats(*out.shape)
    for a, b in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(want[0], twins, dout), strict=True):
        torch.testing.assert_close(a, b)
    packed = fa.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), *cu, 6, 5, **OPTIONS[name])
    assert torch.equal(packed, out)
    square = [(n, n) for n, _ in lengths]
    qkv = floats(9, 3, 4, 8)
    packed = fa.flash_attn_varlen_qkvpacked_func(qkv, cu[0], 6, **OPTIONS[name])
    torch.testing.assert_close(packed, ragged(*qkv.unbind(1), square, **OPTIONS[name])[0])


def test_varlen_of_pages() -> None:
    """Keys that lie in pages, as vLLM calls it; differentiable here."""
    lengths, page_size = [(3, 5), (2, 9), (1, 0)], 4
    q, pages_k, pages_v = floats(6, 4, 8), floats(8, page_size, 2, 8), floats(8, page_size, 2, 8)
    table = torch.tensor([[6, 1, 77], [3, 0, 7], [99, 99, 99]], dtype=torch.int32)
    cu = [cumulative([n[i] for n in lengths]) for i in (0, 1)]
    k, v = (
        torch.cat(
            [
                torch.cat([pages[p] for p in row[: -(-n // 4)]] or [pages[0][:0]])[:n]
                for row, (_, n) in zip(table.tolist(), lengths, strict=True)
            ]
        )
        for pages in (pages_k, pages_v)
    )
    pages_k.requires_grad_()
    out = fa.flash_attn_varlen_func(q, pages_k, pages_v, *cu, 3, 9, causal=True, block_table=table)
    torch.testing.assert_close(out, ragged(q, k, v, lengths, causal=True)[0])
    (grad,) = torch.autograd.grad(out.square().sum(), pages_k)
    assert grad[[2, 4, 5]].abs().max() == 0
    assert grad[6].abs().max() > 0


def test_dropout() -> None:
    q, k, v = torch.zeros(2, 30, 4, 8), torch.zeros(2, 40, 4, 8), torch.eye(40)[None, :, None].expand(2, 40, 4, 40)
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(fa.flash_attn_func(q, k, v, 0.25))
    assert torch.equal(*outs)
    kept = outs[0] > 0
    torch.testing.assert_close(outs[0], kept / (40 * 0.75))
    assert abs(kept.double().mean() - 0.75) < 0.02


def test_lse_is_differentiable() -> None:
    q, k, v = (floats(1, 5, 2, 8).requires_grad_() for _ in range(3))
    grads = [
        torch.autograd.grad(lse.sin().sum(), (q, k))
        for lse in (
            fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[1],
            batched(q, k, v, causal=True)[1],
        )
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("packed", [False, True])
def test_lse_fits_merge_states(packed: bool) -> None:
    """Queries that see no key of a part, +inf in flash-attn's terms, take nothing from it."""
    q, k, v = (torch.randn(1, n, 4, 8, dtype=torch.float64, requires_grad=True) for n in (6, 9, 9))

    def part(keys: slice) -> tuple[Tensor, Tensor]:
        if packed:
            lengths = [torch.tensor([0, n], dtype=torch.int32) for n in (6, keys.stop - keys.start)]
            out, lse, _ = fa.flash_attn_varlen_func(
                q[0], k[0, keys], v[0, keys], *lengths, 6, 9, causal=True, return_attn_probs=True
            )
            return out, lse
        out, lse, _ = fa.flash_attn_func(q, k[:, keys], v[:, keys], causal=True, return_attn_probs=True)
        return out.transpose(1, 2), lse

    # Bottom-right, the first queries see nothing of 4 keys; of the 5 others, all but the first see something.
    states = [part(slice(0, 4)), part(slice(4, 9))]
    assert all((lse == torch.inf).any() for _, lse in states)
    out, lse = merge_states(*zip(*states, strict=True))
    distance = torch.arange(6)[:, None] - torch.arange(9)
    mask = torch.where(torch.arange(9) < 4, distance >= 2, distance >= -3)
    want = attention(*(x.transpose(1, 2) for x in (q, k, v)), mask=mask, return_lse=True)
    want = [want[0][0].transpose(0, 1), want[1][0]] if packed else list(want)
    torch.testing.assert_close([out, lse], want)
    assert (lse == -torch.inf).any()  # the first query sees nothing at all
    found, expected = (
        torch.autograd.grad(o.sin().sum() + x.masked_fill(x == -torch.inf, 0).sum(), (q, k, v), retain_graph=True)
        for o, x in ((out, lse), want)
    )
    torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------------------------------------- the cache

CACHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "append": {"new": 2},
    "causal append": {"new": 3, "seqlen": 3, "causal": True},
    "fewer new keys than queries": {"new": 1, "seqlen": 3, "causal": True},
    "more new keys than queries": {"new": 3, "seqlen": 2, "causal": True},
    "one length": {"new": 1, "cache_seqlens": 4},
    "no length": {"cache_seqlens": None},
    "window, softcap": {"new": 2, "seqlen": 2, "window_size": (3, 0), "softcap": 2.0},
    "alibi": {"new": 2, "seqlen": 2, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]), "causal": True},
    "batch idx": {"new": 2, "cache_batch_idx": torch.tensor([4, 0, 2], dtype=torch.int32)},
    "left pad": {"new": 2, "seqlen": 2, "causal": True, "cache_leftpad": torch.tensor([1, 0, 5], dtype=torch.int32)},
    "left pad, batch idx": {
        "cache_leftpad": torch.tensor([1, 0, 5], dtype=torch.int32),
        "cache_batch_idx": torch.tensor([4, 0, 2], dtype=torch.int32),
    },
    "rotary": {"new": 2, "seqlen": 2, "causal": True, "rotary": True},
    "rotary, halves": {"new": 2, "seqlen": 2, "causal": True, "rotary": True, "rotary_interleaved": False},
    "rotary, not causal": {"new": 2, "seqlen": 3, "rotary": True},
    "rotary, window": {"new": 2, "seqlen": 3, "rotary": True, "window_size": (4, 4)},
    "rotary, fewer new keys": {"new": 1, "seqlen": 3, "causal": True, "rotary": True},
    "pages": {"new": 2, "pages": True},
    "pages, rotary": {"new": 2, "seqlen": 2, "causal": True, "rotary": True, "pages": True},
    "pages, left pad": {"pages": True, "cache_leftpad": torch.tensor([1, 0, 5], dtype=torch.int32)},
}
CAPACITY, PAGE = 12, 4
BLOCK_TABLE = torch.tensor([[5, 2, 9], [0, 11, 3], [7, 8, 1]], dtype=torch.int32)


def turned(x: Tensor, cos: Tensor, sin: Tensor, position: int, interleaved: bool) -> Tensor:
    """x (nheads, headdim) of one token, pair by pair."""
    result, half = x.clone(), cos.shape[1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        result[:, a] = x[:, a] * cos[position, i] - x[:, b] * sin[position, i]
        result[:, b] = x[:, b] * cos[position, i] + x[:, a] * sin[position, i]
    return result


@pytest.mark.parametrize("name", CACHES)
def test_kv_cache(name: str) -> None:
    case = dict(CACHES[name])
    new, seqlen = case.pop("new", 0), case.pop("seqlen", 1)
    rotary, pages = case.pop("rotary", False), case.pop("pages", False)
    lengths = case.pop("cache_seqlens", torch.tensor([5, 0, 9], dtype=torch.int32))
    q = floats(3, seqlen, 4, 8)
    k, v = (floats(3, new, 2, 8) if new else None for _ in range(2))
    caches = [
        floats(12, PAGE, 2, 8) if pages else floats(5 if "cache_batch_idx" in case else 3, CAPACITY, 2, 8)
        for _ in range(2)
    ]
    tables = (floats(CAPACITY + 4, 3), floats(CAPACITY + 4, 3)) if rotary else (None, None)
    if pages:
        case["block_table"] = BLOCK_TABLE
    before = [cache.clone() for cache in caches]
    found = fa.flash_attn_with_kvcache(
        q, *caches, k, v, *tables, cache_seqlens=lengths, return_softmax_lse=True, **case
    )

    interleaved = case.pop("rotary_interleaved", True)
    moving = case.get("causal", False) or "window_size" in case
    leftpad, idx = case.pop("cache_leftpad", torch.zeros(3)), case.pop("cache_batch_idx", torch.arange(3))
    case.pop("block_table", None)
    outs = []
    for b in range(3):
        held = CAPACITY if lengths is None else lengths if isinstance(lengths, int) else int(lengths[b])
        own_q = q[b]
        rows = []
        for which, fresh in enumerate((k, v)):
            cache = before[which]
            row = torch.cat([cache[p] for p in BLOCK_TABLE[b].tolist()]) if pages else cache[int(idx[b])].clone()
            if fresh is not None:
                added = fresh[b]
                if rotary and which == 0:
                    added = torch.stack([turned(x, *tables, held + t, interleaved) for t, x in enumerate(added)])
                row[held : held + new] = added
            rows.append(row)
            after = (
                torch.cat([caches[which][p] for p in BLOCK_TABLE[b].tolist()]) if pages else caches[which][int(idx[b])]
            )
            torch.testing.assert_close(after, row)
        if rotary:
            own_q = torch.stack(
                [turned(x, *tables, held + (i if moving else 0), interleaved) for i, x in enumerate(own_q)]
            )
        seen = torch.arange(held + new) >= leftpad[b]
        outs.append(plain(own_q, *(row[: held + new] for row in rows), seen=seen, **case))
    want = [torch.stack(parts) for parts in zip(*outs, strict=True)]
    torch.testing.assert_close(list(found), want)
    alone = fa.flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths) if name == "plain" else None
    assert alone is None or torch.equal(alone, found[0])


def test_unused_cache_is_never_read() -> None:
    q, caches = floats(2, 1, 2, 8), [floats(2, 9, 2, 8) for _ in range(2)]
    lengths = torch.tensor([3, 7], dtype=torch.int32)
    want = fa.flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths)
    for cache in caches:
        cache[0, 3:] = cache[1, 7:] = torch.nan
    assert torch.equal(fa.flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths), want)


def test_all_keys_that_pages_hold() -> None:
    """As flash-attn does without cache_seqlens, with block_table too."""
    pages_k, pages_v = torch.randn(2, 6, 3, 4, 8)
    table, q = torch.tensor([[5, 0], [1, 1]], dtype=torch.int32), torch.randn(2, 2, 4, 8)
    found = fa.flash_attn_with_kvcache(q, pages_k, pages_v, block_table=table, causal=True)
    k, v = (x[table].flatten(1, 2) for x in (pages_k, pages_v))
    torch.testing.assert_close(found, batched(q, k, v, causal=True)[0])


# ---------------------------------------------------------------------------------------------- padding and rotary


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_unpad_and_pad(dtype: torch.dtype) -> None:
    x = floats(3, 5, 2, 4).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]]).to(dtype)
    packed, indices, cu, longest, used = fa.unpad_input(x, mask)
    assert torch.equal(packed, torch.cat([x[b, i][None] for b, i in mask.nonzero().tolist()]))
    assert indices.tolist() == [0, 1, 2, 6, 8, 9]
    assert (cu.tolist(), cu.dtype, longest, used.tolist()) == ([0, 3, 6, 6], torch.int32, 3, [3, 3, 0])
    padded = fa.pad_input(packed, indices, 3, 5)
    assert torch.equal(padded, x * mask[..., None, None])
    (grad,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(grad, torch.ones_like(x) * mask[..., None, None])
    assert torch.equal(fa.index_first_axis(x.flatten(0, 1), indices), packed)
    assert torch.equal(fa.index_put_first_axis(packed, indices, 15).unflatten(0, (3, 5)), padded)


def test_unpad_with_unused_tokens() -> None:
    x = floats(2, 4, 3)
    mask, unused = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    packed, indices, cu, longest, used = fa.unpad_input(x, mask, unused)
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert (cu.tolist(), longest, used.tolist(), len(packed)) == ([0, 3, 7], 4, [2, 1], 7)


@pytest.mark.parametrize("offsets", [0, 3, torch.tensor([2, 0], dtype=torch.int32)], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool, offsets: int | Tensor) -> None:
    x, cos, sin = floats(2, 4, 3, 8).requires_grad_(), floats(9, 3), floats(9, 3)
    first = [int(n) for n in torch.as_tensor(offsets).expand(2)]
    want = torch.stack(
        [torch.stack([turned(x[b, t], cos, sin, first[b] + t, interleaved) for t in range(4)]) for b in range(2)]
    )
    found = fa.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
    torch.testing.assert_close(found, want)
    assert found.is_contiguous()
    dout = floats(*x.shape)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dout)[0] for y in (found, want)))
    changed = x.detach().clone()
    assert apply_rotary_emb_func(changed, cos, sin, interleaved, True, offsets) is changed
    torch.testing.assert_close(changed, want.detach())
    packed, cu = torch.cat((x[0, :3], x[1])), torch.tensor([0, 3, 7], dtype=torch.int32)
    found = fa.apply_rotary_emb(packed, cos, sin, interleaved, seqlen_offsets=offsets, cu_seqlens=cu, max_seqlen=4)
    torch.testing.assert_close(found, torch.cat((want[0, :3], want[1])))


# ------------------------------------------------------------------------------------------------------- signatures

FLASH_ATTN_2_8 = {
    "flash_attn_func": "q k v",
    "flash_attn_kvpacked_func": "q kv",
    "flash_attn_qkvpacked_func": "qkv",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen",
}
COMMON = {
    **{"dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0},
    **{"alibi_slopes": None, "deterministic": False, "return_attn_probs": False},
}
KV_CACHE = {
    **dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad")),
    **{"block_table": None, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0},
    **{"rotary_interleaved": True, "alibi_slopes": None, "num_splits": 0, "return_softmax_lse": False},
}


def signature(function: Any) -> tuple[list[str], dict[str, Any]]:
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    required = [p.name for p in parameters if p.default is p.empty]
    return required, {p.name: p.default for p in parameters if p.default is not p.empty}


def test_signatures() -> None:
    """Names, order and defaults, as flash-attn 2.8 has them."""
    for name, required in FLASH_ATTN_2_8.items():
        more = {"block_table": None} if name == "flash_attn_varlen_func" else {}
        found = signature(getattr(fa, name))
        assert found == (required.split(), {**COMMON, **more})
        assert list(found[1]) == [*COMMON, *more]
    found = signature(fa.flash_attn_with_kvcache)
    assert found == (["q", "k_cache", "v_cache"], KV_CACHE)
    assert list(found[1]) == list(KV_CACHE)


# ------------------------------------------------------------------------------------------------- import flash_attn


def run_python(program: str, path: Path) -> str:
    """In a process of its own, as an import cannot be taken back."""
    (path / "program.py").write_text(textwrap.dedent(program))
    done = subprocess.run([sys.executable, "program.py"], cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_install(tmp_path: Path) -> None:
    run_python(
        """
        import importlib.metadata, importlib.util, sys
        from fastattn.integrations import flash_attn as ours

        assert importlib.util.find_spec("flash_attn") is None
        assert ours.install() and ours.install()
        spec = importlib.util.find_spec("flash_attn")
        assert spec.name == "flash_attn" and "flash_attn" not in sys.modules

        import flash_attn
        assert flash_attn.flash_attn_interface.flash_attn_func is flash_attn.flash_attn_func
        from flash_attn import flash_attn_func, flash_attn_with_kvcache
        from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
        from flash_attn.flash_attn_interface import flash_attn_varlen_func
        from flash_attn.layers.rotary import apply_rotary_emb

        assert flash_attn_func is ours.flash_attn_func and flash_attn_varlen_func is ours.flash_attn_varlen_func
        assert unpad_input is ours.unpad_input and apply_rotary_emb is ours.apply_rotary_emb
        assert flash_attn.__version__ == "2.8.3+fastattn" and flash_attn.__spec__.name == "flash_attn"
        assert importlib.util.find_spec("flash_attn.bert_padding").name == "flash_attn.bert_padding"
        assert importlib.util.find_spec("flash_attn.ops") is None
        for missing in ("flash_attn.ops", "flash_attn.losses"):
            try:
                importlib.import_module(missing)
                raise SystemExit(1)
            except ModuleNotFoundError as error:
                assert missing in str(error)
        assert not hasattr(flash_attn, "install")
        try:
            importlib.metadata.version("flash_attn")
            raise SystemExit(1)
        except importlib.metadata.PackageNotFoundError:
            pass
        """,
        tmp_path,
    )


def test_a_real_flash_attn_stays(tmp_path: Path) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("__version__ = 'real'\n")
    out = run_python(
        """
        from fastattn.integrations import flash_attn as ours

        print(ours.install())
        import flash_attn

        print(flash_attn.__version__, ours.install())
        """,
        tmp_path,
    )
    assert out.split() == ["False", "real", "False"]


# ----------------------------------------------------------------------------------------------------- torch.compile


def test_compiled() -> None:
    torch._dynamo.reset()
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    qkv, cos, sin = floats(9, 3, 4, 8).requires_grad_(), floats(9, 4), floats(9, 4)

    def run(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(1)
        q, k = (fa.apply_rotary_emb(x, cos, sin, cu_seqlens=cu) for x in (q, k))
        packed = fa.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, causal=True, window_size=(3, 0))
        return packed.sum() + fa.flash_attn_qkvpacked_func(qkv[None], softcap=2.0).square().sum()

    found, want = torch.compile(run, fullgraph=True, backend="aot_eager")(qkv), run(qkv)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, qkv)[0] for x in (found, want)))
    torch._dynamo.reset()
