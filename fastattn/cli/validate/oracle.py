"""Attention in plain PyTorch, one sequence at a time: what `validate` measures backends against.

In float64 it is the truth; in a call's own dtype its error is the yardstick. Written apart from
`fastattn.reference` and `fastattn.philox`, so that those are checked as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .data import Data


@dataclass(frozen=True)
class _Sequence:
    """One sequence, its invisible tail cut off.

    q (heads_q, seqlen_q, head_dim), k and v (heads_kv, seqlen_k, ...); options as in `fastattn.attention`,
    with mask and bias (heads_q, seqlen_q, seqlen_k) and alibi_slopes (heads_q,). number: which of the batch.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    number: int


def _attend(s: _Sequence) -> tuple[Tensor, Tensor]:
    """out (heads_q, seqlen_q, head_dim_v) and lse (heads_q, seqlen_q), everything in q's dtype."""
    get = s.options.get
    scores = _scores(s)
    hidden = (scores == -torch.inf).all(dim=-1)
    if get("sinks") is None:
        logits = scores.masked_fill(hidden[..., None], 0.0)  # softmax of nothing but -inf is NaN
    else:
        logits = torch.cat([scores, s.options["sinks"][:, None, None].expand(*scores.shape[:2], 1)], dim=-1)
    probs = torch.softmax(logits, dim=-1)[..., : scores.shape[-1]].masked_fill(hidden[..., None], 0.0)
    if get("dropout_p"):
        first_query = get("q_offset", 0)
        keep = dropout_keep(s.options["seed"], s.options["dropout_p"], s.number, scores.shape, first_query)
        probs = probs * keep.to(s.q.device) / (1.0 - s.options["dropout_p"])
    lse = torch.logsumexp(logits, dim=-1)
    lse = lse if get("sinks") is not None else lse.masked_fill(hidden, -torch.inf)
    return probs @ _for_each_query_head(s.v, s.q), lse


def _scores(s: _Sequence) -> Tensor:
    get = s.options.get
    seqlen_q, seqlen_k, dim = s.q.shape[1], s.k.shape[1], s.q.shape[2]
    scale = get("scale")
    if scale is None:
        scale = 1.0 / math.sqrt(dim) if dim else 1.0
    scores = scale * (s.q @ _for_each_query_head(s.k, s.q).transpose(1, 2))
    if get("softcap"):
        scores = s.options["softcap"] * torch.tanh(scores / s.options["softcap"])
    offset = get("q_offset", 0 if get("causal_alignment") == "top-left" else seqlen_k - seqlen_q)
    ahead = torch.arange(seqlen_k)[None, :] - (torch.arange(seqlen_q)[:, None] + offset)
    ahead = ahead.to(s.q.device)  # how far key j stands to the right of query i
    if get("alibi_slopes") is not None:
        scores = scores - s.options["alibi_slopes"][:, None, None] * ahead.abs()
    if get("bias") is not None:
        scores = scores + s.options["bias"]
    left, right = get("window") or (None, None)
    visible = torch.ones_like(ahead, dtype=torch.bool)
    if left is not None:
        visible &= ahead >= -left
    if right is not None:
        visible &= ahead <= right
    if get("causal"):
        visible &= ahead <= 0
    if get("mask") is not None:
        visible = visible & s.options["mask"]
    return scores.masked_fill(~visible, -torch.inf)


def _for_each_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) if x.shape[0] else x


# ---------------------------------------------------------------------------------------------- kinds of call


def attend(data: Data) -> tuple[Tensor, Tensor]:
    """(out, lse) of a dense or varlen call."""
    return _varlen(data) if "cu_seqlens_q" in data.options else _dense(data)


def _dense(data: Data) -> tuple[Tensor, Tensor]:
    (batch, heads_q, seqlen_q, _), (seqlen_k, dim_v) = data.q.shape, data.v.shape[2:]
    if batch == 0:
        lse = data.q.new_zeros(0, heads_q, seqlen_q, requires_grad=True)
        return data.q.new_zeros(0, heads_q, seqlen_q, dim_v, requires_grad=True), lse
    full = (batch, heads_q, seqlen_q, seqlen_k)
    parts = [
        _attend(_cut(data, b, data.q[b], data.k[b, :, :n], data.v[b, :, :n], full))
        for b, n in enumerate(_lengths(data, [seqlen_k] * batch))
    ]
    outs, lses = zip(*parts, strict=True)
    return torch.stack(outs), torch.stack(lses)


def _varlen(data: Data) -> tuple[Tensor, Tensor]:
    starts_q, starts_k = (data.options[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    sizes_q, sizes_k = ([b - a for a, b in pairwise(x)] for x in (starts_q, starts_k))
    full = (len(sizes_q), data.q.shape[1], max(sizes_q), max(sizes_k))
    outs, lses = [], []
    for b, n in enumerate(_lengths(data, sizes_k)):
        q = data.q[starts_q[b] : starts_q[b + 1]].transpose(0, 1)
        k, v = (x[starts_k[b] : starts_k[b] + n].transpose(0, 1) for x in (data.k, data.v))
        out, lse = _attend(_cut(data, b, q, k, v, full))
        outs.append(out.transpose(0, 1))
        lses.append(lse)
    spare = data.q.shape[0] - starts_q[-1]
    outs.append(data.q.new_zeros(spare, data.q.shape[1], data.v.shape[2]))
    lses.append(data.q.new_full((data.q.shape[1], spare), -torch.inf))
    return torch.cat(outs), torch.cat(lses, dim=1)


def attend_with_cache(data: Data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, new keys as they must be in the cache, new values); the caches are not changed."""
    options = data.options
    before = options["cache_lengths"].tolist()
    capacity = data.k.shape[2] * (options["block_table"].shape[1] if "block_table" in options else 1)
    full = (len(before), data.q.shape[1], data.q.shape[2], capacity)
    outs, lses, new_keys = [], [], []
    for b, length in enumerate(before):
        q = data.q[b]
        k, v = (_cached(x, b, length, options.get("block_table")) for x in (data.k, data.v))
        if "k_new" in options:
            new_keys.append(_rotate(options["k_new"][b], options, length))
            k, v = torch.cat([k, new_keys[-1]], dim=1), torch.cat([v, options["v_new"][b]], dim=1)
        q = _rotate(q, options, int(options["q_offset"][b]) if "q_offset" in options else k.shape[1] - q.shape[1])
        out, lse = _attend(_cut(data, b, q, k, v, full))
        outs.append(out)
        lses.append(lse)
    keys = torch.stack(new_keys) if new_keys else data.k[:0]
    return torch.stack(outs), torch.stack(lses), keys, options.get("v_new", data.v[:0])


def _lengths(data: Data, whole: list[int]) -> list[int]:
    return data.options["kv_lengths"].tolist() if "kv_lengths" in data.options else whole


def _cut(data: Data, b: int, q: Tensor, k: Tensor, v: Tensor, full: tuple[int, ...]) -> _Sequence:
    """Sequence b with its part of what spans the batch; `full` is what mask and bias broadcast to."""
    options = dict(data.options)
    for name in ("mask", "bias"):
        if name in options:
            options[name] = options[name].expand(full)[b, :, : q.shape[1], : k.shape[1]]
    if options.get("alibi_slopes") is not None:
        options["alibi_slopes"] = options["alibi_slopes"].expand(full[:2])[b]
    if "q_offset" in options:
        options["q_offset"] = int(options["q_offset"][b])
    return _Sequence(q, k, v, options, b)


# ------------------------------------------------------------------------------------------- cache and rotary


def _cached(cache: Tensor, b: int, length: int, block_table: Tensor | None) -> Tensor:
    """The first `length` rows of sequence b, (heads_kv, length, dim)."""
    if block_table is None:
        return cache[b, :, :length]
    size = cache.shape[2]
    rows = [cache[int(block_table[b, p // size]), :, p % size] for p in range(length)]
    return torch.stack(rows, dim=1) if rows else cache[0, :, :0]


def _rotate(x: Tensor, options: dict[str, Any], start: int) -> Tensor:
    """Rotates x (heads, seqlen, dim), whose first row stands at position `start`, if the call asks for it."""
    if "rotary" not in options:
        return x
    cos, sin, interleaved = options["rotary"]
    rows = slice(start, start + x.shape[1])
    half = cos.shape[1]
    cos, sin, turned = cos[rows], sin[rows], x.clone()
    first: Callable[[int], int] = (lambda p: 2 * p) if interleaved else (lambda p: p)
    second: Callable[[int], int] = (lambda p: 2 * p + 1) if interleaved else (lambda p: p + half)
    for pair in range(half):
        a, b = x[..., first(pair)], x[..., second(pair)]
        turned[..., first(pair)] = a * cos[:, pair] - b * sin[:, pair]
        turned[..., second(pair)] = a * sin[:, pair] + b * cos[:, pair]
    return turned


# ---------------------------------------------------------------------------------------------------- dropout


def dropout_keep(
    seed: int, p: float, sequence: int, shape: torch.Size | tuple[int, int, int], first_query: int = 0
) -> Tensor:
    """What dropout keeps of a sequence's probabilities: bool (heads, seqlen_q, seqlen_k).

    Entry (h, i, j) is kept if word j % 4 of Philox4x32-10, with key `seed` and counter
    (j // 4, first_query + i, sequence * heads + h, 0), is at least floor(p * 2^32).
    """
    heads, seqlen_q, seqlen_k = shape
    key = (seed % 2**32, seed // 2**32)
    threshold = math.floor(p * 2**32)
    keep = torch.empty(heads, seqlen_q, seqlen_k, dtype=torch.bool)
    for h in range(heads):
        for i in range(seqlen_q):
            blocks = range(-(-seqlen_k // 4))
            words = [
                w
                for block in blocks
                for w in philox4x32((block, (first_query + i) % 2**32, sequence * heads + h, 0), key)
            ]
            keep[h, i] = torch.tensor([w >= threshold for w in words[:seqlen_k]], dtype=torch.bool)
    return keep


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in plain integers.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
    """
    for turn in range(10):
        low, high = (key[0] + turn * 0x9E3779B9) & 0xFFFFFFFF, (key[1] + turn * 0xBB67AE85) & 0xFFFFFFFF
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (b >> 32 ^ counter[1] ^ low, b & 0xFFFFFFFF, a >> 32 ^ counter[3] ^ high, a & 0xFFFFFFFF)
    return counter
