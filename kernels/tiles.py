"""Tiles of matrices in memory: where their rows lie, loading and storing them.

All offsets are computed in 64 bits, so tensors may span more than 2^31 elements. A head_dim that is no power of two is
padded with zeros by masks, which cost nothing where there is no padding.
"""

import triton
import triton.language as tl


@triton.jit
def head_of(x, batch, head, start):
    """Address of row `start` of a head of an `Array`; batch, head and start may be tensors."""
    rows = start.to(tl.int64) * x.row
    return x.data + (batch.to(tl.int64) * x.batch + head.to(tl.int64) * x.head + rows)


@triton.jit
def rows_of(base, offs, stride):
    """Addresses of rows, from that of the first."""
    return base + offs.to(tl.int64) * stride


@triton.jit
def load_tile(rows, stride, rows_ok, MASK_ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of rows at these addresses; zeros past DIM and, if asked, where not `rows_ok`."""
    offs_d = FIRST + tl.arange(0, WIDTH)
    pointers = rows[:, None] + offs_d[None, :] * stride
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
def store_tile(rows, stride, tile, rows_ok, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """The opposite of `load_tile`, rounding to the type in memory."""
    offs_d = FIRST + tl.arange(0, WIDTH)
    ok = rows_ok[:, None]
    if FIRST + WIDTH > DIM:
        ok = ok & (offs_d[None, :] < DIM)
    tl.store(rows[:, None] + offs_d[None, :] * stride, tile.to(rows.dtype.element_ty), mask=ok)


@triton.jit
def key_order(BLOCK_N: tl.constexpr, PERMUTED: tl.constexpr):
    """Which key of a block each column of a tile of scores stands for.

    Permuted, the two pairs of columns that a thread holds of every 16 (in the accumulators of tensor cores) are four
    keys in a row: the four words of one call of Philox, or one load of the mask.
    """
    c = tl.arange(0, BLOCK_N)
    if PERMUTED:
        c = (c // 16) * 16 + (c & 6) * 2 + (c & 8) // 4 + (c & 1)
    return c
