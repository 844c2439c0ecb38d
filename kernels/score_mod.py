"""From products of queries and keys to scores in units of log2, masks and dropout: shared by forward and backward.

Plain scores stay products; their scale is folded into the exponent. What has a softcap, ALiBi, a bias or a scale that
is not positive is transformed first. Index arguments i (queries) and j (keys) are columns and rows, either way round.
"""

import triton
import triton.language as tl

from .tiles import offset_of

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x, RELATIVE: tl.constexpr):
    """By the base-2 exponential, absolute error 2e-7. RELATIVE: near 0, where that cancels, by the series."""
    result = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    if RELATIVE:
        y = x * x
        series = x + x * y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0))))
        result = tl.where(y < 0.0625, series, result)
    return result


@triton.jit
def exponent_factor(scores, VARIANT: tl.constexpr):
    """What makes scores exponents of 2."""
    if VARIANT.PLAIN:
        factor = scores.scale * LOG2E
    elif VARIANT.FLOAT32:
        factor = scores.scale * 0.0 + LOG2E
    else:
        factor = scores.scale * 0.0 + 1.0
    return factor


@triton.jit
def unit_of_scores(scores, VARIANT: tl.constexpr):
    """What one unit of scores is in natural units."""
    if VARIANT.PLAIN:
        unit = scores.scale
    elif VARIANT.FLOAT32:
        unit = scores.scale * 0.0 + 1.0
    else:
        unit = scores.scale * 0.0 + LN2
    return unit


@triton.jit
def at(x, batch, head, i, j):
    """Addresses of elements (i, j) of an `Array`."""
    return x.data + (offset_of(x, batch, head, i) + j.to(tl.int64) * x.column)


@triton.jit
def transform(products, scores, batch, head, i, j, offset, visible, MASKED: tl.constexpr, VARIANT: tl.constexpr):
    """(scores, in natural units if FLOAT32, else in units of log2; tanh of the softcap if there is one).

    `visible` says which elements of the bias may be read, if MASKED.
    """
    unit = 1.0 if VARIANT.FLOAT32 else LOG2E
    capped = products
    if scores.softcap is not None:
        capped = tanh(products * (scores.scale / scores.softcap), VARIANT.RELATIVE)
        s = capped * (scores.softcap * unit)
    else:
        s = products * (scores.scale * unit)
    if scores.slopes is not None:
        slope = tl.load(scores.slopes.data + offset_of(scores.slopes, batch, head, batch * 0)).to(tl.float32) * unit
        s -= slope * tl.abs(i + offset - j).to(tl.float32)
    if scores.bias is not None:
        pointers = at(scores.bias, batch, head, i, j)
        if MASKED:
            bias = tl.load(pointers, mask=visible, other=0.0)
        else:
            bias = tl.load(pointers)
        s += bias.to(tl.float32) * unit
    return s, capped


@triton.jit
def seen(scores, batch, head, i, j, visible, MASKED: tl.constexpr):
    """Which elements the mask leaves of the visible ones."""
    pointers = at(scores.mask, batch, head, i, j)
    if MASKED:
        return tl.load(pointers, mask=visible, other=0) != 0
    return tl.load(pointers) != 0


@triton.jit
def kept(dropout, i, row, n, BLOCK_N: tl.constexpr):
    """Which probabilities of queries i, a column, and the block of keys that begins at n survive; keys permuted.

    row: batch * heads_q + head. Source of the words: Salmon et al., see fastattn/philox.py.
    """
    fours = (n // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    zero = (i * 0 + fours * 0).to(tl.uint32)
    k0 = dropout.seed_low.to(tl.uint32, bitcast=True)
    k1 = dropout.seed_high.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = tl.philox_impl(
        zero + fours.to(tl.uint32), zero + i.to(tl.uint32), zero + row.to(tl.uint32), zero, k0, k1
    )
    # Column 16 a + 8 b + 2 t + e is key 16 a + 4 t + 2 b + e: word 2 b + e of four number 4 a + t.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, (i.shape[0], BLOCK_N // 16, 4, 2, 2))
    words = tl.reshape(tl.permute(words, (0, 1, 3, 2, 4)), (i.shape[0], BLOCK_N))
    return words >= dropout.threshold.to(tl.uint32, bitcast=True)
