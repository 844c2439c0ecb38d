"""Combines the results over the splits of a long list of keys."""

import triton
import triton.language as tl

from .arguments import VARYING
from .online_softmax import combine_lse, split_lse
from .tiles import load_tile, rounding_error, store_rows


@triton.jit(do_not_specialize=VARYING)
def combine(
    out_accum,
    lse_accum,
    lse_accum_residual,
    out,
    lse,
    out_residual,
    lse_residual,
    sinks,
    rows,
    splits,
    stride_out,
    stride_lse,
    heads_q,
    seqlen_q,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM: tl.constexpr,
):
    """A block of rows; splits are added in the same order always. Reads and writes each number once: memory bounds it.

    out_accum: (splits, batch, heads_q, seqlen_q, DIM), float32.
    lse_accum and, with lse_residual, lse_accum_residual: (splits, batch, heads_q, seqlen_q), float32.
    lse and lse_residual are contiguous as well.
    """
    offs_r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = offs_r < rows
    offs_m = offs_r % seqlen_q
    head = offs_r // seqlen_q % heads_q
    b = offs_r // seqlen_q // heads_q
    TYPE: tl.constexpr = tl.float32 if lse_residual is None else tl.float64
    total = tl.zeros((BLOCK_M,), TYPE) - float("inf")
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for split in range(splits):
        split_lse_rows = tl.load(lse_accum + split * stride_lse + offs_r, mask=ok, other=-float("inf")).to(TYPE)
        if lse_residual is not None:
            split_lse_rows += tl.load(lse_accum_residual + split * stride_lse + offs_r, mask=ok, other=0.0)
        split_out = load_tile(out_accum + split * stride_out, offs_r.to(tl.int64) * DIM, 1, ok, True, 0, BLOCK_D, DIM)
        total, share_before, share = combine_lse(total, split_lse_rows)
        acc = acc * share_before[:, None] + split_out * share[:, None]
    saw_nothing = total == -float("inf")
    if sinks is not None:
        sink = tl.load(sinks + head).to(TYPE)
        total, share_of_keys, _ = combine_lse(total, sink)
        total = tl.where(saw_nothing, sink, total)
        acc = tl.where(saw_nothing[:, None], 0.0, acc * share_of_keys[:, None])
    store_rows(out, b, head, offs_m, ok, acc, 0, BLOCK_D, DIM)
    if out_residual is not None:
        error = rounding_error(acc, out.data.dtype.element_ty)
        if sinks is not None:
            error = tl.where(saw_nothing[:, None], float("inf"), error)
        store_rows(out_residual, b, head, offs_m, ok, error, 0, BLOCK_D, DIM)
    total, residual = split_lse(total)
    tl.store(lse + offs_r, total, mask=ok)
    if lse_residual is not None:
        tl.store(lse_residual + offs_r, tl.where(saw_nothing, float("inf"), residual), mask=ok)
