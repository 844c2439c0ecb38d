"""What changes a score: softcap, ALiBi and bias, on the way from products of q and k to scores.

Without a score mod, scores stay products, and their scale is folded into the exponent (HAS_SCORE_MOD is False).
A scale that is not positive counts as a score mod. Scores are then in units of log2, and natural units if FLOAT32.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import offset_of

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class ScoreTile(NamedTuple):
    """Where a tile of scores lies. Queries and keys are columns and rows, either way round."""

    batch: Any
    head: Any  # of each query, or of all
    row: Any  # batch * heads_q + head
    i: Any  # positions of queries
    j: Any  # positions of keys
    n: Any  # where the block of keys begins
    diagonal_offset: Any  # the key at which query 0 stands


@triton.jit
def tanh(x, RELATIVE: tl.constexpr):
    """By the base-2 exponential, absolute error 2e-7. RELATIVE: by the series near 0, where the difference cancels."""
    result = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    if RELATIVE:
        y = x * x
        series = x + x * y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0))))
        result = tl.where(y < 0.0625, series, result)
    return result


@triton.jit
def scale_log2(score_mod, VARIANT: tl.constexpr):
    """Scores times this are exponents of 2."""
    if not VARIANT.HAS_SCORE_MOD:
        factor = score_mod.scale * LOG2E
    elif VARIANT.FLOAT32:
        factor = score_mod.scale * 0.0 + LOG2E
    else:
        factor = score_mod.scale * 0.0 + 1.0
    return factor


@triton.jit
def unit_of_scores(score_mod, VARIANT: tl.constexpr):
    """One unit of scores in natural units."""
    if not VARIANT.HAS_SCORE_MOD:
        unit = score_mod.scale
    elif VARIANT.FLOAT32:
        unit = score_mod.scale * 0.0 + 1.0
    else:
        unit = score_mod.scale * 0.0 + LN2
    return unit


@triton.jit
def pointers_of(x, at):
    """Addresses of the elements of an `Array` beside a tile of scores."""
    return x.data + (offset_of(x, at.batch, at.head, at.i) + at.j.to(tl.int64) * x.column)


@triton.jit
def apply_score_mod(products, score_mod, at, visible, MASKED: tl.constexpr, VARIANT: tl.constexpr):
    """(scores, tanh of the softcap if there is one).

    `visible` says which elements of the bias may be read, if MASKED.
    """
    unit = 1.0 if VARIANT.FLOAT32 else LOG2E
    capped = products
    if score_mod.softcap is not None:
        capped = tanh(products * (score_mod.scale / score_mod.softcap), VARIANT.RELATIVE_TANH)
        s = capped * (score_mod.softcap * unit)
    else:
        s = products * (score_mod.scale * unit)
    if score_mod.slopes is not None:
        slopes = score_mod.slopes
        slope = tl.load(slopes.data + offset_of(slopes, at.batch, at.head, at.batch * 0)).to(tl.float32) * unit
        s -= slope * tl.abs(at.i + at.diagonal_offset - at.j).to(tl.float32)
    if score_mod.bias is not None:
        pointers = pointers_of(score_mod.bias, at)
        if MASKED:
            bias = tl.load(pointers, mask=visible, other=0.0)
        else:
            bias = tl.load(pointers)
        s += bias.to(tl.float32) * unit
    return s, capped
