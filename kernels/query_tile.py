"""A tile of queries inside a kernel: which it is, where its keys lie, and which of them it sees."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .block_info import diagonal_offset, key_blocks, keys_of, queries_of, tile_of, visible_keys
from .rotary import load_rotated
from .score_mod import exponent_factor
from .tiles import load_block, load_rows, load_tile, offset_of


class QueryTile(NamedTuple):
    """Rows past the last query of a sequence are zeros, and never stored."""

    q: Any  # (BLOCK_M, BLOCK_D)
    rows_ok: Any  # (BLOCK_M,)
    tokens: Any  # (BLOCK_M,): positions in the tensors
    offs_m: Any  # (BLOCK_M, 1): positions in the sequence; past its end, of the last query
    batch: Any
    heads: Any  # of each row, (BLOCK_M,), or of all
    head: Any  # the same for use beside a tile of scores: (BLOCK_M, 1), or a number
    head_kv: Any
    row: Any  # batch * heads_q + head
    base_k: Any  # addresses of the first key and value of its sequence and head
    base_v: Any
    first: Any  # (BLOCK_M,): the first and last key that each query sees
    last: Any
    low: Any  # no query of the tile sees keys before `low` or from `high` on
    high: Any
    whole: Any  # the blocks from `whole` to `cut` need no mask
    cut: Any
    offset: Any  # of the diagonal
    factor: Any  # scores times this are exponents of 2


@triton.jit
def rows_per_query(heads, VARIANT: tl.constexpr):
    """Rows of a tile that one query takes."""
    return heads.group if VARIANT.PACKED else heads.group * 0 + 1


@triton.jit
def place(heads, sequences, splits, VARIANT: tl.constexpr):
    """(tile of its sequence, split, head, sequence) of this program; the grid is flat, in this order."""
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    tiles = (sequences.seqlen_q * rows_per_query(heads, VARIANT) + BLOCK_M - 1) // BLOCK_M
    if sequences.cu_seqlens_q is not None:
        tiles = sequences.seqlen_q // BLOCK_M + sequences.batch + 1
    pid = tl.program_id(0)
    m_index = tiles - 1 - pid % tiles  # the last queries see most keys when causal, so they go first
    pid = pid // tiles
    split = pid * 0
    if splits is not None:
        split = pid % splits
        pid = pid // splits
    head_count = heads.heads_kv if VARIANT.PACKED else heads.heads_q
    head = pid % head_count
    b = pid // head_count
    if sequences.cu_seqlens_q is not None:
        b, m_index = tile_of(m_index, sequences.cu_seqlens_q, sequences.batch, BLOCK_M)
    return m_index, split, head, b


@triton.jit
def query_tile(q, k, v, heads, sequences, window, scores, rotation, m_index, head, b, VARIANT: tl.constexpr):
    """The tile; it must hold at least one query. `head` is one of heads_kv if packed, else of heads_q."""
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    per_query = rows_per_query(heads, VARIANT)
    start_q, seqlen_q = queries_of(sequences, b)
    start_k, _, kv_length = keys_of(sequences, b)
    rows = seqlen_q * per_query
    offs_r = m_index * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = offs_r < rows
    offs_m = offs_r // per_query
    head_kv = head if VARIANT.PACKED else head // heads.group
    head_m = head * per_query + offs_r % per_query if VARIANT.PACKED else head
    beside = head_m[:, None] if VARIANT.PACKED else head_m

    offset = diagonal_offset(window, seqlen_q, kv_length)
    first, last = visible_keys(window, offs_m, offset, kv_length)
    first_m = m_index * BLOCK_M // per_query
    last_m = (tl.minimum(m_index * BLOCK_M + BLOCK_M, rows) - 1) // per_query
    low, high, whole, cut = key_blocks(window, first_m, last_m, offset, kv_length, VARIANT.BLOCK_N)

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
        head=beside,
        head_kv=head_kv,
        row=b * heads.heads_q + beside,
        base_k=k.data + offset_of(k, kv_batch, head_kv, start_k),
        base_v=v.data + offset_of(v, kv_batch, head_kv, start_k),
        first=first,
        last=last,
        low=low,
        high=high,
        whole=whole,
        cut=cut,
        offset=offset,
        factor=exponent_factor(scores, VARIANT),
    )


@triton.jit
def visible_to(tile, window, cols, n):
    """Which of the keys n + cols each query sees.

    One comparison per side: what depends on the block is subtracted from the rows, not added to the columns.
    """
    visible = cols[None, :] <= (tile.last - n)[:, None]
    if window.left is not None:
        visible = visible & (cols[None, :] >= (tile.first - n)[:, None])
    return visible


@triton.jit
def load_keys(
    x,
    base,
    batch,
    n,
    cols,
    ok,
    paging,
    MASK: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """Rows n + cols of the keys or values of a head, from a contiguous or a paged cache."""
    if VARIANT.PAGED:
        page, slot = page_and_slot(batch, n + cols, ok, paging)
        offsets = offset_of(x, page, batch * 0, slot)
        tile = load_tile(base, offsets, x.column, ok, MASK, FIRST, WIDTH, DIM)
    else:
        tile = load_block(x, base + n.to(tl.int64) * x.row, cols, ok, MASK, FIRST, WIDTH, DIM, VARIANT)
    return tile


@triton.jit
def page_and_slot(batch, positions, ok, paging):
    """Where positions of a sequence lie in a paged cache. A wrong entry of the table must not lead out of it."""
    entry = paging.table + (batch.to(tl.int64) * paging.stride + positions // paging.page_size)
    page = tl.load(entry, mask=ok, other=0)
    return tl.minimum(tl.maximum(page, 0), paging.pages - 1), positions % paging.page_size
