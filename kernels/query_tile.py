"""The tile of queries that one program of the forward or the dQ kernel works on."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .block_info import diagonal_offset, key_blocks, keys_of, queries_of, rows_per_query
from .mask import visible_keys
from .rotary import load_rotated
from .score_mod import scale_log2
from .tiles import load_rows, offset_of


class QueryTile(NamedTuple):
    """Rows past the last query of a sequence are zeros, and never stored."""

    q: Any  # (BLOCK_M, BLOCK_D)
    rows_ok: Any  # (BLOCK_M,)
    tokens: Any  # (BLOCK_M,): positions in the tensors
    offs_m: Any  # (BLOCK_M, 1): positions in the sequence; past its end, of the last query
    batch: Any
    heads: Any  # of each row, (BLOCK_M,), or of all
    head: Any  # the same beside a tile of scores: (BLOCK_M, 1), or a number
    head_kv: Any
    row: Any  # batch * heads_q + head
    base_k: Any  # addresses of the first key and value of its sequence and head
    base_v: Any
    first_key: Any  # (BLOCK_M,): the first and last key that each query sees
    last_key: Any
    n_begin: Any  # see block_info.key_blocks
    n_end: Any
    full_begin: Any
    full_end: Any
    diagonal_offset: Any  # the key at which query 0 stands
    scale_log2: Any  # scores times this are exponents of 2


@triton.jit
def load_query_tile(q, k, v, heads, sequences, window, score_mod, rotation, m_index, head, b, VARIANT: tl.constexpr):
    """The tile; it must hold at least one query. `head` is one of heads_kv if PACK_GQA, else of heads_q."""
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    per_query = rows_per_query(heads, VARIANT)
    start_q, seqlen_q = queries_of(sequences, b)
    start_k, _, kv_length = keys_of(sequences, b)
    rows = seqlen_q * per_query
    offs_r = m_index * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = offs_r < rows
    offs_m = offs_r // per_query
    head_kv = head if VARIANT.PACK_GQA else head // heads.group
    head_m = head * per_query + offs_r % per_query if VARIANT.PACK_GQA else head
    head_beside_scores = head_m[:, None] if VARIANT.PACK_GQA else head_m

    offset = diagonal_offset(window, sequences, b, seqlen_q, kv_length)
    first_key, last_key = visible_keys(window, offs_m, offset, kv_length)
    first_m = m_index * BLOCK_M // per_query
    last_m = (tl.minimum(m_index * BLOCK_M + BLOCK_M, rows) - 1) // per_query
    n_begin, n_end, full_begin, full_end = key_blocks(window, first_m, last_m, offset, kv_length, VARIANT.BLOCK_N)

    tokens = start_q + offs_m
    if VARIANT.ROTARY_DIM > 0:
        offsets = offset_of(q, b, head_m, tokens)
        tile_q = load_rotated(q, offsets, rows_ok, offs_m + offset, rotation, VARIANT)
    else:
        tile_q = load_rows(q, b, head_m, tokens, rows_ok, VARIANT.BLOCK_D, VARIANT.HEAD_DIM)
    kv_batch = b * 0 if VARIANT.PAGED else b
    return QueryTile(
        q=tile_q,
        rows_ok=rows_ok,
        tokens=tokens,
        offs_m=tl.minimum(offs_m, last_m)[:, None],
        batch=b,
        heads=head_m,
        head=head_beside_scores,
        head_kv=head_kv,
        row=b * heads.heads_q + head_beside_scores,
        base_k=k.data + offset_of(k, kv_batch, head_kv, start_k),
        base_v=v.data + offset_of(v, kv_batch, head_kv, start_k),
        first_key=first_key,
        last_key=last_key,
        n_begin=n_begin,
        n_end=n_end,
        full_begin=full_begin,
        full_end=full_end,
        diagonal_offset=offset,
        scale_log2=scale_log2(score_mod, VARIANT),
    )
