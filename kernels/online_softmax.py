"""The online softmax: a running maximum and sum per row.

Scores times `scale_log2` are exponents of 2. The scale thus costs no multiplication of its own: it is part of the one
multiply-add that subtracts the maximum.
Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

import triton
import triton.language as tl

from .score_mod import LOG2E

MAX_LAG_LOG2 = tl.constexpr(8.0)


@triton.jit
def init(scale_log2, ROWS: tl.constexpr, ROW_SUMS: tl.constexpr):
    """(row_max, row_sum) before any score. The maximum is finite, so rows that see nothing need no special case.

    ROW_SUMS: sums per row. With 8, of every eighth column, a thread adds what it holds; threads meet at the end.
    """
    lowest = -3e38 / tl.maximum(scale_log2, 1.0)
    return tl.zeros((ROWS,), tl.float32) + lowest, tl.zeros((ROWS, ROW_SUMS), tl.float32)


@triton.jit
def rescale(row_max, row_sum, acc, new_max, scale_log2, PARTS: tl.constexpr):
    """(row_max, row_sum, acc) relative to a new maximum."""
    # The difference first: rounding row_max * scale_log2 alone would leave a residue between equal maxima.
    factor = tl.exp2((row_max - new_max) * scale_log2)
    scaled = ()
    for part in tl.static_range(PARTS):
        scaled = scaled + (acc[part] * factor[:, None],)
    return new_max, row_sum * factor[:, None], scaled


@triton.jit
def update(row_max, row_sum, acc, scores, scale_log2, PARTS: tl.constexpr, VARIANT: tl.constexpr):
    """(row_max, row_sum, acc, probs) with a block of scores; acc still lacks the block's values.

    VARIANT.LAZY_RESCALE: row_max lags behind the maximum until some row's grew by more than 2^MAX_LAG_LOG2.
    Any number that keeps exponentials in range will do, and most blocks then need no multiplication of acc.
    In float32 scores are subtracted before they are scaled: rounded products would lose the digits in which large
    scores differ.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    ROW_SUMS: tl.constexpr = VARIANT.ROW_SUMS
    if VARIANT.LAZY_RESCALE:
        if tl.max((new_max - row_max) * scale_log2, 0) > MAX_LAG_LOG2:
            row_max, row_sum, acc = rescale(row_max, row_sum, acc, new_max, scale_log2, PARTS)
    else:
        row_max, row_sum, acc = rescale(row_max, row_sum, acc, new_max, scale_log2, PARTS)
    if VARIANT.FLOAT32:
        probs = tl.exp2((scores - row_max[:, None]) * scale_log2)
    else:
        probs = tl.exp2(scores * scale_log2 - (row_max * scale_log2)[:, None])
    if ROW_SUMS == 1:
        sums = tl.sum(probs, 1)[:, None]
    else:
        sums = tl.sum(tl.reshape(probs, (probs.shape[0], probs.shape[1] // ROW_SUMS, ROW_SUMS)), 1)
    return row_max, row_sum + sums, acc, probs


@triton.jit
def finalize(row_max, row_sum, unit, TYPE: tl.constexpr):
    """(lse in natural units, the factor that normalizes acc).

    unit: one unit of row_max in natural units. TYPE: of lse; tl.float64 keeps the digits that `split_lse` returns.
    """
    total = tl.sum(row_sum, 1)
    nothing = total == 0.0
    lse = tl.where(nothing, -float("inf"), row_max.to(TYPE) * unit + tl.log(total))
    return lse, tl.where(nothing, 0.0, 1.0 / total)


@triton.jit
def split_lse(lse):
    """(lse in float32, its rounding error); probabilities are recomputed from both."""
    rounded = lse.to(tl.float32)
    error = (lse - rounded.to(lse.dtype)).to(tl.float32)
    return rounded, tl.where(tl.abs(rounded) < float("inf"), error, 0.0)


@triton.jit
def combine_lse(first, second):
    """(lse of both, share of the first, share of the second) for two sets of keys; shares of nothing are 0.

    A sink is a set of one score without a value.
    """
    highest = tl.maximum(first, second)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp2((first - highest).to(tl.float32) * LOG2E), tl.exp2((second - highest).to(tl.float32) * LOG2E)
    total = weights[0] + weights[1]
    nothing = total == 0.0
    lse = tl.where(nothing, -float("inf"), highest + tl.log(total))
    return lse, tl.where(nothing, 0.0, weights[0] / total), tl.where(nothing, 0.0, weights[1] / total)
