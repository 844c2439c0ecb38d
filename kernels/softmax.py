"""The online softmax: a running maximum and sum per row, in units of log2.

Scores times `factor` are exponents of 2, so that the scale costs no multiplication of its own: it is part of the one
multiply-add that subtracts the maximum. Source: Milakov and Gimelshein, "Online normalizer calculation for softmax"
(2018).
"""

import triton
import triton.language as tl

from .scores import LN2, LOG2E


@triton.jit
def start(factor, ROWS: tl.constexpr):
    """(row_max, row_sum) before any score. The maximum is finite, so rows that see nothing need no care."""
    lowest = -3e38 / tl.maximum(factor, 1.0)
    return tl.zeros((ROWS,), tl.float32) + lowest, tl.zeros((ROWS,), tl.float32)


@triton.jit
def update(row_max, row_sum, scores, factor):
    """(row_max, row_sum, probs, rescale): what was summed before must be multiplied with `rescale`."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # The difference first: rounding row_max * factor by itself would leave a residue between equal maxima.
    rescale = tl.exp2((row_max - new_max) * factor)
    probs = tl.exp2(scores * factor - (new_max * factor)[:, None])
    return new_max, row_sum * rescale + tl.sum(probs, 1), probs, rescale


@triton.jit
def finish(row_max, row_sum, factor):
    """(lse, what the accumulated values are multiplied with); lse in natural units, as callers get it."""
    nothing = row_sum == 0.0
    lse = tl.where(nothing, -float("inf"), row_max * factor * LN2 + tl.log(row_sum))
    return lse, tl.where(nothing, 0.0, 1.0 / row_sum)


@triton.jit
def merge(first, second):
    """(lse of both, share of the first, share of the second) for two sets of keys; shares of nothing are 0."""
    high = tl.maximum(first, second)
    high = tl.where(high == -float("inf"), 0.0, high)
    weights = tl.exp2((first - high) * LOG2E), tl.exp2((second - high) * LOG2E)
    total = weights[0] + weights[1]
    nothing = total == 0.0
    lse = tl.where(nothing, -float("inf"), high + tl.log(total))
    return lse, tl.where(nothing, 0.0, weights[0] / total), tl.where(nothing, 0.0, weights[1] / total)


@triton.jit
def add_sink(lse, sink):
    """(lse with one more score that has no value, share of what it was before); nothing seen stays nothing."""
    with_sink, share, _ = merge(lse, sink)
    return tl.where(lse == -float("inf"), lse, with_sink), share
