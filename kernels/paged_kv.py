"""Loads blocks of keys and values from contiguous memory or from the pages of a cache."""

import triton
import triton.language as tl

from .tiles import load_block, load_tile, offset_of


@triton.jit
def load_kv_block(
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
    """Rows n + cols of the keys or values of a head, whose first row is at the address `base`."""
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
