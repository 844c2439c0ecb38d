"""What hides a score: the window around the diagonal, the number of keys, and a boolean mask.

All kernels ask here what a query sees. Which blocks they visit follows from the same window, see block_info.py.
"""

import triton
import triton.language as tl

from .score_mod import pointers_of


@triton.jit
def visible_keys(window, offs_m, offset, kv_length):
    """(first, last) key that each query sees; `first` is 0 if the window is open to the left."""
    last = tl.minimum(offs_m + offset + window.right, kv_length - 1)
    first = offs_m * 0
    if window.left is not None:
        first = tl.maximum(offs_m + offset - window.left, 0)
    return first, last


@triton.jit
def in_window(window, first, last, cols, n, KEYS_FIRST: tl.constexpr = False):
    """Which of the keys n + cols each query sees: a row per query, or per key if KEYS_FIRST.

    One comparison per side: the block's position is subtracted from the limits, not added to the columns.
    """
    if KEYS_FIRST:
        visible = cols[:, None] <= (last - n)[None, :]
        if window.left is not None:
            visible = visible & (cols[:, None] >= (first - n)[None, :])
    else:
        visible = cols[None, :] <= (last - n)[:, None]
        if window.left is not None:
            visible = visible & (cols[None, :] >= (first - n)[:, None])
    return visible


@triton.jit
def load_mask(mask, at, visible, MASKED: tl.constexpr):
    """Which of the `visible` keys of a `ScoreTile` the boolean mask shows too; it is read at those alone if MASKED."""
    if mask.data is None:
        shown = visible
    elif MASKED:
        shown = tl.load(pointers_of(mask.data, at), mask=visible, other=0) != 0
    else:
        shown = tl.load(pointers_of(mask.data, at)) != 0
    return shown


@triton.jit
def apply_mask(mask, tile, visible, hidden, MASKED: tl.constexpr):
    """The tile, with the number `hidden` where a key is not visible. Full blocks without a boolean mask stay."""
    if MASKED or mask.data is not None:
        tile = tl.where(visible, tile, hidden)
    return tile
