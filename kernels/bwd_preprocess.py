"""What the backward kernels read for each row beside q and dout: lse in their units, and delta."""

import triton
import triton.language as tl

from .arguments import VARYING, BwdRows
from .online_softmax import split_lse
from .score_mod import LOG2E
from .tiles import RESIDUAL_SCALE, load_rows, row_array


@triton.jit(do_not_specialize=VARYING)
def bwd_preprocess(
    out,
    out_residual,
    dout,
    lse,
    lse_residual,
    dlse,
    row_lse,
    delta,
    rows,
    heads_q,
    seqlen_q,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM: tl.constexpr,
    HAS_SCORE_MOD: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    """Per row: row_lse, which is lse in units of log2, and delta. Reads its inputs once.

    delta = rowsum(dout * (out + out_residual / RESIDUAL_SCALE)) - dlse.
    Rows that saw no key get row_lse = +inf, so that their probabilities are 0.
    out_residual and lse_residual may be None; either is inf in rows that saw nothing but a sink.
    All numbers per row are contiguous, (batch, heads_q, seqlen_q).
    FLOAT32: row_lse is the sum of two numbers, (2, batch, heads_q, seqlen_q), as lse + lse_residual is. Its units are
    those of scores (of products without HAS_SCORE_MOD), which are scaled after it is subtracted.
    """
    offs_r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = offs_r < rows
    offs_r = tl.minimum(offs_r, rows - 1)
    offs_m = offs_r % seqlen_q
    head = offs_r // seqlen_q % heads_q
    b = offs_r // seqlen_q // heads_q
    tile_o = load_rows(out, b, head, offs_m, ok, BLOCK_D, DIM)
    tile_do = load_rows(dout, b, head, offs_m, ok, BLOCK_D, DIM)
    sums = tl.sum(tile_o.to(tl.float32) * tile_do.to(tl.float32), 1)
    given = tl.load(lse + offs_r)
    nothing = given == -float("inf")
    if out_residual is not None:
        # In a sum of its own: these products are exact in float32. Others may be fused into the sum, which then differs
        # between the threads that share a row.
        tile_residual = load_rows(out_residual, b, head, offs_m, ok, BLOCK_D, DIM).to(tl.float32)
        nothing = nothing | (tl.max(tile_residual, 1) == float("inf"))
        sums += tl.sum(tile_residual * tile_do.to(tl.float32), 1) / RESIDUAL_SCALE
    residual = tl.zeros((BLOCK_M,), tl.float32)
    if lse_residual is not None:
        residual = tl.load(lse_residual + offs_r)
        nothing = nothing | (residual == float("inf"))
    if dlse is not None:
        sums -= tl.load(dlse + offs_r).to(tl.float32)
    tl.store(delta + offs_r, tl.where(nothing, 0.0, sums), mask=ok)
    if FLOAT32:
        exact = given.to(tl.float64) + residual
        if not HAS_SCORE_MOD:
            exact /= scale
        exponent, residual = split_lse(tl.where(nothing, float("inf"), exact))
        tl.store(row_lse + rows.to(tl.int64) + offs_r, residual, mask=ok)
    else:
        exponent = tl.where(nothing, float("inf"), given * LOG2E)
    tl.store(row_lse + offs_r, exponent, mask=ok)


@triton.jit
def bwd_rows(dout, row_lse, delta, heads, sequences, VARIANT: tl.constexpr):
    """`BwdRows` of Arrays: dout, and what `bwd_preprocess` wrote."""
    lse = row_array(row_lse, heads, sequences)
    residual = lse
    if VARIANT.FLOAT32:
        rows = sequences.seqlen_q.to(tl.int64) * heads.heads_q
        if sequences.cu_seqlens_q is None:
            rows *= sequences.batch
        residual = row_array(row_lse + rows, heads, sequences)
    return BwdRows(dout, lse, residual, row_array(delta, heads, sequences))
