"""Attention as one writes it in PyTorch without thinking of precision: every step in the inputs' own dtype.

Its error against float64 is the yardstick of `tolerance`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import oracle


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    causal_alignment: str = "bottom-right",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    q_offset: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out, lse), both in q's dtype."""
    (batch, heads_q, seqlen_q, head_dim), seqlen_k = q.shape, k.shape[2]
    k, v = (x.repeat_interleave(heads_q // k.shape[1], dim=1) for x in (k, v)) if k.shape[1] else (k, v)
    lengths = torch.full((batch,), seqlen_k) if kv_lengths is None else kv_lengths.cpu().long()
    offset = lengths - seqlen_q if causal_alignment == "bottom-right" else torch.zeros_like(lengths)
    offset = offset if q_offset is None else q_offset.cpu().long()
    offset, lengths = offset.view(-1, 1, 1, 1), lengths.view(-1, 1, 1, 1)
    distance = torch.arange(seqlen_q)[:, None] + offset - torch.arange(seqlen_k)
    left, right = window if window is not None else (None, None)
    visible = (torch.arange(seqlen_k) < lengths).expand_as(distance)
    visible = visible if left is None else visible & (distance <= left)
    visible = visible if right is None else visible & (distance >= -right)
    visible = visible & (distance >= 0) if causal else visible
    visible = visible.to(q.device)
    visible = visible if mask is None else visible & mask

    scores = (scale if scale is not None else 1 / math.sqrt(max(head_dim, 1))) * (q @ k.transpose(-2, -1))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None].to(q.dtype) * distance.abs().to(q)
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.to(q.dtype)[:, None, None].expand(batch, heads_q, seqlen_q, 1)
        scores = torch.cat((scores, column), dim=-1)
    # Rows without keys are replaced before the softmax, so that its gradient is not NaN there.
    empty = (~visible).all(dim=-1).expand(batch, heads_q, seqlen_q)
    scores = scores.masked_fill(empty[..., None], 0.0)
    probs = torch.softmax(scores, dim=-1)[..., :seqlen_k].masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(scores, dim=-1)
    lse = lse.masked_fill(empty, -torch.inf) if sinks is None else torch.where(empty, sinks.to(q.dtype)[:, None], lse)
    if dropout_p > 0.0:
        rows = range(first_batch * heads_q, (first_batch + batch) * heads_q)
        keep = np.empty((len(rows), seqlen_q, seqlen_k))
        for place, row in enumerate(rows):
            first_query = 0 if q_offset is None else int(q_offset[place // heads_q])
            keep[place] = oracle.dropout_keep(seed, dropout_p, row, seqlen_q, seqlen_k, first_query)
        probs = probs * torch.from_numpy(keep).to(q).view_as(probs) / (1 - dropout_p)
    return probs @ v, lse


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: list[int], cu_seqlens_k: list[int], **options: Any
) -> tuple[Tensor, Tensor]:
    """(out, lse) of packed sequences."""
    outs, lses = [], []
    for b in range(len(cu_seqlens_q) - 1):
        rows = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1])
        cols = slice(cu_seqlens_k[b], cu_seqlens_k[b + 1])
        cut = oracle.sequence_cut(b, rows.stop - rows.start, cols.stop - cols.start)
        own = {name: cut(x) if name in ("mask", "bias") else x for name, x in options.items()}
        for name in ("kv_lengths", "q_offset"):
            if own.get(name) is not None:
                own[name] = own[name][b : b + 1]
        if own.get("alibi_slopes") is not None and own["alibi_slopes"].ndim == 2:
            own["alibi_slopes"] = own["alibi_slopes"][b]
        parts = (oracle.as_one_sequence(x, tokens) for x, tokens in ((q, rows), (k, cols), (v, cols)))
        out, lse = dense(*parts, **own, first_batch=b)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    rest = q.shape[0] - cu_seqlens_q[-1]
    nothing = 0.0 * q.sum()  # so that autograd knows the result even when there is no sequence
    outs.append(nothing.expand(rest, q.shape[1], v.shape[2]))
    lses.append(nothing.expand(q.shape[1], rest) - torch.inf)
    return torch.cat(outs), torch.cat(lses, dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, positions: Tensor) -> Tensor:
    """Rotary embedding of x (B, H, S, D) at positions (B, S)."""
    cos, sin = (table[positions.long()][:, None].to(x.dtype) for table in (cos, sin))
    half = cos.shape[-1]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    result = x.clone()
    result[..., first] = x[..., first] * cos - x[..., second] * sin
    result[..., second] = x[..., second] * cos + x[..., first] * sin
    return result
