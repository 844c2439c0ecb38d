"""Probabilities, recomputed from lse, and the gradients of scores: what all backward kernels need of a tile."""

import triton
import triton.language as tl

from .dropout import keep_mask
from .mask import apply_mask, load_mask
from .score_mod import LOG2E, apply_score_mod, scale_log2


@triton.jit
def probs_and_dscores(
    products, dprobs, rows, score_mod, mask, dropout, at, visible, MASKED: tl.constexpr, VARIANT: tl.constexpr
):
    """(probs after dropout, dscores, dproducts) of a `ScoreTile`, either way round.

    dscores, the gradient after the softcap, belongs to the bias; dproducts, the one before it, to q and k.
    rows: `BwdRows` of tiles that broadcast to the tile of scores; its dout is not used.
    """
    capped = products
    s = products
    if VARIANT.HAS_SCORE_MOD:
        s, capped = apply_score_mod(products, score_mod, at, visible, MASKED, VARIANT)
    if VARIANT.FLOAT32:
        exponent = (s - rows.lse - rows.lse_residual) * scale_log2(score_mod, VARIANT)
    elif not VARIANT.HAS_SCORE_MOD:
        exponent = s * (score_mod.scale * LOG2E) - rows.lse
    else:
        exponent = s - rows.lse
    probs = tl.exp2(exponent)
    visible = load_mask(mask, at, visible, MASKED)
    probs = apply_mask(mask, probs, visible, 0.0, MASKED)
    dropped = probs
    if dropout.threshold is not None:
        if at.i.shape[0] == 1:
            keep = tl.trans(keep_mask(dropout, tl.trans(at.i), at.row, at.n, VARIANT.BLOCK_N))
        else:
            keep = keep_mask(dropout, at.i, at.row, at.n, VARIANT.BLOCK_N)
        dropped = tl.where(keep, probs, 0.0)
        dprobs = tl.where(keep, dprobs * dropout.scale, 0.0)
    dscores = probs * (dprobs - rows.delta)
    dproducts = dscores
    if score_mod.softcap is not None:
        dproducts = dscores * (1.0 - capped * capped)
    # Hidden gradients may be 0 times NaN.
    dscores = apply_mask(mask, dscores, visible, 0.0, MASKED)
    dproducts = apply_mask(mask, dproducts, visible, 0.0, MASKED)
    return dropped, dscores, dproducts
