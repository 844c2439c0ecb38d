"""The online softmax: a running maximum and sum per row, in units of log2.

Scores times `factor` are exponents of 2, so that the scale costs no multiplication of its own: it is part of the one
multiply-add that subtracts the maximum. Source: Milakov and Gimelshein, "Online normalizer calculation for softmax"
(2018).
"""

import triton
import triton.language as tl

from .score_mod import LOG2E

LAZIEST = tl.constexpr(8.0)


@triton.jit
def start(factor, ROWS: tl.constexpr, SUMS: tl.constexpr):
    """(row_max, row_sum) before any score. The maximum is finite, so rows that see nothing need no care.

    SUMS: sums per row. With 8, of every eighth column, a thread adds up what it holds, and threads meet at the end.
    """
    lowest = -3e38 / tl.maximum(factor, 1.0)
    return tl.zeros((ROWS,), tl.float32) + lowest, tl.zeros((ROWS, SUMS), tl.float32)


@triton.jit
def _rescaled(row_max, row_sum, acc, new_max, factor, PARTS: tl.constexpr):
    """Everything summed so far, relative to a new maximum."""
    # The difference first: rounding row_max * factor by itself would leave a residue between equal maxima.
    rescale = tl.exp2((row_max - new_max) * factor)
    scaled = ()
    for part in tl.static_range(PARTS):
        scaled = scaled + (acc[part] * rescale[:, None],)
    return new_max, row_sum * rescale[:, None], scaled


@triton.jit
def update(row_max, row_sum, acc, scores, factor, PARTS: tl.constexpr, VARIANT: tl.constexpr):
    """(row_max, row_sum, acc, probs) with a block of scores; acc still lacks the block's values.

    VARIANT.LAZY: the maximum stays as it is until some row's grew to more than 2^LAZIEST times it, as any number will
    do that keeps exponentials in range. Most blocks then need no multiplication of acc. In float32 scores are
    subtracted before they are scaled: rounded products of large ones would lose the digits in which they differ.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    SUMS: tl.constexpr = VARIANT.SUMS
    if VARIANT.LAZY:
        if tl.max((new_max - row_max) * factor, 0) > LAZIEST:
            row_max, row_sum, acc = _rescaled(row_max, row_sum, acc, new_max, factor, PARTS)
    else:
        row_max, row_sum, acc = _rescaled(row_max, row_sum, acc, new_max, factor, PARTS)
    if VARIANT.FLOAT32:
        probs = tl.exp2((scores - row_max[:, None]) * factor)
    else:
        probs = tl.exp2(scores * factor - (row_max * factor)[:, None])
    if SUMS == 1:
        sums = tl.sum(probs, 1)[:, None]
    else:
        sums = tl.sum(tl.reshape(probs, (probs.shape[0], probs.shape[1] // SUMS, SUMS)), 1)
    return row_max, row_sum + sums, acc, probs


@triton.jit
def finish(row_max, row_sum, unit, TYPE: tl.constexpr):
    """(lse, what the accumulated values are multiplied with); lse in natural units, as callers get it.

    unit: what one unit of row_max is in natural units. TYPE: of lse. In tl.float64 it has the digits of which
    `split_lse` keeps the rest.
    """
    total = tl.sum(row_sum, 1)
    nothing = total == 0.0
    lse = tl.where(nothing, -float("inf"), row_max.to(TYPE) * unit + tl.log(total))
    return lse, tl.where(nothing, 0.0, 1.0 / total)


@triton.jit
def split_lse(lse):
    """(lse in float32, what rounding took from it); probabilities are recomputed from both."""
    high = lse.to(tl.float32)
    low = (lse - high.to(lse.dtype)).to(tl.float32)
    return high, tl.where(tl.abs(high) < float("inf"), low, 0.0)


@triton.jit
def merge(first, second):
    """(lse of both, share of the first, share of the second) for two sets of keys; shares of nothing are 0.

    A sink is a set of one score, which has no value.
    """
    high = tl.maximum(first, second)
    high = tl.where(high == -float("inf"), 0.0, high)
    weights = tl.exp2((first - high).to(tl.float32) * LOG2E), tl.exp2((second - high).to(tl.float32) * LOG2E)
    total = weights[0] + weights[1]
    nothing = total == 0.0
    lse = tl.where(nothing, -float("inf"), high + tl.log(total))
    return lse, tl.where(nothing, 0.0, weights[0] / total), tl.where(nothing, 0.0, weights[1] / total)
