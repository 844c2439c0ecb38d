"""Tiles of matrices in memory: where their rows lie, loading and storing them.

Offsets are computed in 64 bits, except those within a block, so tensors may span more than 2^31 elements.
A head_dim that is no power of two is padded with zeros by masks, which cost nothing where there is no padding.
"""

import triton
import triton.language as tl

from .arguments import Array

RESIDUAL_SCALE = tl.constexpr(256.0)
"""Keeps rounding errors of small numbers above the smallest of float16 (kResidualScale in csrc/call/params.h)."""


@triton.jit
def offset_of(x, batch, head, row):
    """Where a row of an `Array` begins, in elements; each of batch, head and row may be a tensor."""
    return batch.to(tl.int64) * x.batch + head.to(tl.int64) * x.head + row.to(tl.int64) * x.row


@triton.jit
def load_tile(
    base, offsets, stride, rows_ok, MASK_ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    """Columns FIRST to FIRST + WIDTH of rows at these offsets; zeros past DIM and, if asked, where not `rows_ok`.

    base: one address, or one per row, as a column.
    """
    offs_d = FIRST + tl.arange(0, WIDTH)
    pointers = base + (offsets[:, None] + (offs_d.to(offsets.dtype) * stride)[None, :])
    if FIRST + WIDTH <= DIM:
        if MASK_ROWS:
            tile = tl.load(pointers, mask=rows_ok[:, None], other=0.0)
        else:
            tile = tl.load(pointers)
    else:
        ok = offs_d[None, :] < DIM
        if MASK_ROWS:
            ok = ok & rows_ok[:, None]
        tile = tl.load(pointers, mask=ok, other=0.0)
    return tile


@triton.jit
def load_block(
    x,
    base,
    rows,
    rows_ok,
    MASK_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """Rows of an `Array` counted from address `base`, where a block begins, inside a loop over blocks.

    A thread loads about every ROWS_PER_PASS-th row. The steps between its rows are the same for all threads.
    Apart from the row that a thread starts at, they need no registers of their own.
    """
    if VARIANT.INT64_OFFSETS:
        rows = rows.to(tl.int64)
    STEP: tl.constexpr = VARIANT.ROWS_PER_PASS
    steps = base + (rows // STEP * STEP) * x.row
    return load_tile(steps[:, None], rows % STEP * x.row, x.column, rows_ok, MASK_ROWS, FIRST, WIDTH, DIM)


@triton.jit
def load_rows(x, batch, head, rows, rows_ok, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Whole rows of an `Array`, where `rows_ok`; zeros elsewhere."""
    return load_tile(x.data, offset_of(x, batch, head, rows), x.column, rows_ok, True, 0, WIDTH, DIM)


@triton.jit
def store_rows(x, batch, head, rows, rows_ok, tile, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Stores columns FIRST to FIRST + WIDTH of rows, rounding to the type in memory."""
    offs_d = FIRST + tl.arange(0, WIDTH)
    ok = rows_ok[:, None]
    if FIRST + WIDTH > DIM:
        ok = ok & (offs_d[None, :] < DIM)
    pointers = x.data + (offset_of(x, batch, head, rows)[:, None] + (offs_d.to(tl.int64) * x.column)[None, :])
    tl.store(pointers, tile.to(x.data.dtype.element_ty), mask=ok)


@triton.jit
def row_array(data, heads, sequences):
    """lse or another number per row: contiguous (batch, heads_q, seqlen_q), varlen (heads_q, total_q)."""
    batch = sequences.seqlen_q.to(tl.int64) * heads.heads_q
    if sequences.cu_seqlens_q is not None:
        batch = batch * 0
    return Array(data, batch, sequences.seqlen_q, 1, 0)


@triton.jit
def rounding_error(x, DTYPE: tl.constexpr):
    """The error of rounding x to a type, times RESIDUAL_SCALE; 0 where that is not finite."""
    error = (x - x.to(DTYPE).to(tl.float32)) * RESIDUAL_SCALE
    return tl.where(tl.abs(error) < float("inf"), error, 0.0)


@triton.jit
def key_order(BLOCK_N: tl.constexpr, PERMUTED: tl.constexpr):
    """Which key of a block each column of a tile of scores stands for.

    In the accumulators of tensor cores a thread holds two pairs of columns of every 16. Permuted, they are four keys
    in a row: the four words of one call of Philox, or one load of the mask.
    """
    c = tl.arange(0, BLOCK_N)
    if PERMUTED:
        c = (c // 16) * 16 + (c & 6) * 2 + (c & 8) // 4 + (c & 1)
    return c


@triton.jit
def any_nan(tile):
    """Whether a number of the tile is NaN."""
    return tl.max(tl.max((tile != tile).to(tl.int32), 1), 0) != 0
