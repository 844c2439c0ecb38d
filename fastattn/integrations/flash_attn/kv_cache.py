"""flash_attn_with_kvcache: attention over a cache that it first extends in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...functional import attention_with_kv_cache
from ...problem import check_heads, check_shape
from ...rotary import Rotary
from .arguments import check_like, check_rank, check_tables, check_tensors, check_values, flash_lse, options
from .rotary import rotate


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q over cached keys and values, after k and v have been written behind them. Inference only.

        q                 (batch_size, seqlen, nheads, headdim)
        k_cache, v_cache  (batch_size_cache, seqlen_cache, nheads_k, headdim), or with block_table
                          (num_blocks, page_block_size, nheads_k, headdim); updated in place
        k, v              (batch_size, seqlen_new, nheads_k, headdim), both or neither
        rotary_cos, _sin  (seqlen_rotary, rotary_dim / 2), only with k and v: new key t stands at position
                          cache_seqlens + t, and so does query t if causal or with a window, else all queries stand
                          at cache_seqlens
        cache_seqlens     keys in the cache before the call: int or (batch_size,), int32; None = as many as there is
                          room for, only without k and v
        cache_batch_idx   (batch_size,), int32: the row of the cache that belongs to each sequence; None = its own
                          number; not with block_table
        cache_leftpad     (batch_size,), int32: the first key of each sequence; those before it are not seen
        block_table       (batch_size, max_num_blocks), int32: the pages of each sequence
        rotary_interleaved  pairs features 2i and 2i + 1 instead of i and i + rotary_dim / 2
        num_splits        not needed here

    softmax_scale, causal, window_size, softcap and alibi_slopes as in the other functions; seqlen_k is the
    number of keys after the call, and the caller advances cache_seqlens.
    Returns out (batch_size, seqlen, nheads, headdim), or (out, softmax_lse (batch_size, nheads, seqlen)).
    Raises TypeError or ValueError that names the argument, what came and what was expected; ValueError also if an
    input requires grad while gradients are recorded.
    """
    _check(q, k_cache, v_cache, k, v, paged=block_table is not None)
    batch = q.shape[0]
    capacity, holder = k_cache.shape[1], "a row of k_cache"
    if block_table is not None:
        check_tensors(block_table=block_table)
        spelled = "(batch_size, max_num_blocks)"
        check_rank("block_table", block_table, spelled)
        check_shape("block_table", block_table.shape, (batch, block_table.shape[1]), spelled)
        capacity, holder = k_cache.shape[1] * block_table.shape[1], "the pages in a row of block_table"
    lengths = _lengths(q, k, cache_seqlens, capacity)
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("cache_batch_idx must be None with block_table, got both")
        _check_index("cache_batch_idx", cache_batch_idx, batch)
        check_values("cache_batch_idx", cache_batch_idx, k_cache.shape[0] - 1, "the last row of k_cache")
        block_table = cache_batch_idx[:, None]  # a row of the cache is a page of its own
    elif block_table is None and k_cache.shape[0] != batch:
        raise ValueError(
            f"k_cache must have the {batch} rows of q without cache_batch_idx, got shape {tuple(k_cache.shape)}"
        )
    room = capacity - (0 if k is None else k.shape[1])
    check_values("cache_seqlens", lengths, room, f"the capacity of {holder} less the new keys")
    mask = None
    if cache_leftpad is not None:
        _check_index("cache_leftpad", cache_leftpad, batch)
        mask = (torch.arange(capacity, device=q.device) >= cache_leftpad[:, None])[:, None, None]
    given = options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if rotary_cos is not None or rotary_sin is not None:
        if rotary_cos is None or rotary_sin is None or k is None:
            raise ValueError("rotary_cos, rotary_sin, k and v go together, got only some of them")
        check_tables(q.shape[3], rotary_cos=rotary_cos, rotary_sin=rotary_sin)
        tables = Rotary(rotary_cos, rotary_sin, rotary_interleaved)
        moving = causal or given["window"] is not None
        q, k = _rotated(q, k, tables, lengths, moving)
    out, lse = attention_with_kv_cache(
        *(x.transpose(1, 2) for x in (q, k_cache, v_cache)),
        cache_lengths=lengths,
        k_new=None if k is None else k.transpose(1, 2),
        v_new=None if v is None else v.transpose(1, 2),
        block_table=block_table,
        mask=mask,
        **given,
        return_lse=True,
    )
    out = out.transpose(1, 2)
    return (out, flash_lse(lse)) if return_softmax_lse else out


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, *, paged: bool) -> None:
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    check_rank("q", q, "(batch_size, seqlen, nheads, headdim)")
    blocks = "num_blocks, page_block_size" if paged else "batch_size_cache, seqlen_cache"
    spelled = f"({blocks}, nheads_k, headdim)"
    check_rank("k_cache", k_cache, spelled)
    check_rank("v_cache", v_cache, spelled)
    check_shape("k_cache", k_cache.shape, (*k_cache.shape[:3], q.shape[3]), spelled)
    check_shape("v_cache", v_cache.shape[:3], k_cache.shape[:3], f"({blocks}, nheads_k, ...)")
    check_heads(q.shape[2], k_cache.shape[2])
    if (k is None) != (v is None):
        raise ValueError("k and v go together, got only one of them")
    if k is not None and v is not None:
        check_tensors(k=k, v=v)
        check_like(q, k=k, v=v)
        spelled = "(batch_size, seqlen_new, nheads_k, headdim)"
        check_rank("k", k, spelled)
        check_rank("v", v, spelled)
        check_shape("k", k.shape, (q.shape[0], k.shape[1], *k_cache.shape[2:]), spelled)
        check_shape("v", v.shape, (*k.shape[:3], v_cache.shape[3]), spelled)


def _lengths(q: Tensor, k: Tensor | None, cache_seqlens: Any, capacity: int) -> Tensor:
    """(batch_size,), int32."""
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens must be an int or an int32 tensor with k and v, got None")
        cache_seqlens = capacity
    if isinstance(cache_seqlens, (int, torch.SymInt)) and not isinstance(cache_seqlens, bool):
        number: Any = cache_seqlens
        return torch.full((q.shape[0],), number, dtype=torch.int32, device=q.device)
    if not isinstance(cache_seqlens, Tensor):
        raise TypeError(f"cache_seqlens must be an int, an int32 tensor or None, got {type(cache_seqlens).__name__}")
    _check_index("cache_seqlens", cache_seqlens, q.shape[0])
    return cache_seqlens


def _check_index(name: str, x: Any, batch: int) -> None:
    check_tensors(**{name: x})
    if x.dtype != torch.int32:
        raise TypeError(f"{name} must have dtype torch.int32, got {x.dtype}")
    check_shape(name, x.shape, (batch,), "(batch_size,)")


def _rotated(q: Tensor, k: Tensor, tables: Rotary, lengths: Tensor, moving: bool) -> tuple[Tensor, Tensor]:
    """q and k at their positions; not `moving`: all queries at that of the first new key."""
    new = torch.arange(k.shape[1], device=k.device)
    own = torch.arange(q.shape[1], device=q.device)
    q_positions, k_positions = lengths[:, None] + (own if moving else torch.zeros_like(own)), lengths[:, None] + new
    for name, positions in (("queries", q_positions), ("new keys", k_positions)):
        check_values(f"the positions of the {name}", positions, tables.cos.shape[0] - 1, "the last row of rotary_cos")
    return rotate(q, tables, q_positions), rotate(k, tables, k_positions)
