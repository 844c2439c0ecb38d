"""The backward kernels: what each row needs, the gradients of q, and those of k and v.

No atomics: dQ and dK/dV are two passes, each of which owns what it writes, so results are the same from run to run.
Both recompute the probabilities from lse: 7 products of tiles against the forward's 2, which bounds them.
Source: Dao, "FlashAttention-2" (2023).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import VARYING, Dropout, Scores, Sequences
from .block_info import (
    diagonal_offset,
    keys_of,
    masked_block,
    queries_of,
    query_blocks,
    tile_of,
    visible_keys,
)
from .online_softmax import split_lse
from .query_tile import load_keys, place, query_tile, visible_to
from .score_mod import LOG2E, exponent_factor, kept, seen, transform
from .tiles import RESIDUAL_SCALE, any_nan, key_order, load_block, load_rows, offset_of, row_array, store_rows


@triton.jit(do_not_specialize=VARYING)
def statistics(
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
    PLAIN: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    """Per row: lse in units of log2 (+inf if it saw nothing, so that its probabilities are 0), and delta.

    delta = rowsum(dout * (out + out_residual / RESIDUAL_SCALE)) - dlse. out_residual and lse_residual may be None;
    either is inf in rows that saw nothing but a sink. All numbers per row are contiguous, (batch, heads_q, seqlen_q).
    FLOAT32: row_lse is the sum of two numbers, (2, batch, heads_q, seqlen_q), as lse + lse_residual is, in
    units of scores (of products, if PLAIN), which are scaled after it is subtracted. Reads its inputs once.
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
        tile_low = load_rows(out_residual, b, head, offs_m, ok, BLOCK_D, DIM).to(tl.float32)
        nothing = nothing | (tl.max(tile_low, 1) == float("inf"))
        sums += tl.sum(tile_low * tile_do.to(tl.float32), 1) / RESIDUAL_SCALE
    low = tl.zeros((BLOCK_M,), tl.float32)
    if lse_residual is not None:
        low = tl.load(lse_residual + offs_r)
        nothing = nothing | (low == float("inf"))
    if dlse is not None:
        sums -= tl.load(dlse + offs_r).to(tl.float32)
    tl.store(delta + offs_r, tl.where(nothing, 0.0, sums), mask=ok)
    if FLOAT32:
        exact = given.to(tl.float64) + low
        if PLAIN:
            exact /= scale
        exponent, low = split_lse(tl.where(nothing, float("inf"), exact))
        tl.store(row_lse + rows.to(tl.int64) + offs_r, low, mask=ok)
    else:
        exponent = tl.where(nothing, float("inf"), given * LOG2E)
    tl.store(row_lse + offs_r, exponent, mask=ok)


@triton.jit
def exponents(row_lse, heads, sequences, VARIANT: tl.constexpr):
    """(Array of row_lse, Array of what is to be added to it); the latter means something if FLOAT32."""
    high = row_array(row_lse, heads, sequences)
    low = high
    if VARIANT.FLOAT32:
        rows = sequences.seqlen_q.to(tl.int64) * heads.heads_q
        if sequences.cu_seqlens_q is None:
            rows *= sequences.batch
        low = row_array(row_lse + rows, heads, sequences)
    return high, low


@triton.jit
def gradient_of_scores(
    products,
    dprobs,
    row_lse,
    row_low,
    delta,
    scores,
    dropout,
    b,
    head,
    row,
    i,
    j,
    n,
    offset,
    visible,
    MASKED: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """(probs after dropout, gradient after the softcap, gradient before it) of a tile of scores, either way round.

    row_low: what is to be added to row_lse if FLOAT32. The two gradients differ by the softcap's derivative: the former
    belongs to the bias, the latter to the products.
    """
    capped = products
    s = products
    if not VARIANT.PLAIN:
        s, capped = transform(products, scores, b, head, i, j, offset, visible, MASKED, VARIANT)
    if VARIANT.FLOAT32:
        exponent = (s - row_lse - row_low) * exponent_factor(scores, VARIANT)
    elif VARIANT.PLAIN:
        exponent = s * (scores.scale * LOG2E) - row_lse
    else:
        exponent = s - row_lse
    probs = tl.exp2(exponent)
    if scores.mask is not None:
        visible = seen(scores, b, head, i, j, visible, MASKED)
    if MASKED or scores.mask is not None:
        probs = tl.where(visible, probs, 0.0)
    dropped = probs
    if dropout.threshold is not None:
        if i.shape[0] == 1:
            keep = tl.trans(kept(dropout, tl.trans(i), row, n, VARIANT.BLOCK_N))
        else:
            keep = kept(dropout, i, row, n, VARIANT.BLOCK_N)
        dropped = tl.where(keep, probs, 0.0)
        dprobs = tl.where(keep, dprobs * dropout.scale, 0.0)
    dscores = probs * (dprobs - delta)
    dproducts = dscores
    if scores.softcap is not None:
        dproducts = dscores * (1.0 - capped * capped)
    if MASKED or scores.mask is not None:
        # What is hidden may be NaN, times 0.
        dscores = tl.where(visible, dscores, 0.0)
        dproducts = tl.where(visible, dproducts, 0.0)
    return dropped, dscores, dproducts


@triton.jit
def _query_step(
    dq,
    tile,
    tile_do,
    row_lse,
    row_low,
    delta,
    k,
    v,
    n,
    scores,
    window,
    dropout,
    MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """One block of keys, from n on, for a tile of queries."""
    cols = key_order(VARIANT.BLOCK_N, VARIANT.PERMUTED)
    offs_n = n + cols
    ok = (offs_n >= tile.low) & (offs_n < tile.high)
    WIDTH_V: tl.constexpr = VARIANT.PART * VARIANT.PARTS
    tile_k = load_keys(
        k, tile.base_k, tile.batch, n, cols, ok, None, MASKED, 0, VARIANT.BLOCK_D, VARIANT.HEAD_DIM, VARIANT
    )
    tile_v = load_keys(v, tile.base_v, tile.batch, n, cols, ok, None, MASKED, 0, WIDTH_V, VARIANT.HEAD_DIM_V, VARIANT)
    products = tl.dot(tile.q, tl.trans(tile_k), input_precision=VARIANT.PRECISION)
    dprobs = tl.dot(tile_do, tl.trans(tile_v), input_precision=VARIANT.PRECISION)
    visible = visible_to(tile, window, cols, n)
    probs, dscores, dproducts = gradient_of_scores(
        products,
        dprobs,
        row_lse,
        row_low,
        delta,
        scores,
        dropout,
        tile.batch,
        tile.head,
        tile.row,
        tile.offs_m,
        offs_n[None, :],
        n,
        tile.offset,
        visible,
        MASKED,
        VARIANT,
    )
    if CAREFUL:
        any_sees = tl.max((dproducts != 0).to(tl.int32), 0) != 0
        tile_k = load_keys(
            k, tile.base_k, tile.batch, n, cols, any_sees, None, True, 0, VARIANT.BLOCK_D, VARIANT.HEAD_DIM, VARIANT
        )
    return tl.dot(dproducts.to(tile_k.dtype), tile_k, dq, input_precision=VARIANT.PRECISION)


@triton.jit
def _over_keys(
    tile,
    tile_do,
    row_lse,
    row_low,
    delta,
    k,
    v,
    scores,
    window,
    dropout,
    CAREFUL: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """dQ of a tile but for the scale. CAREFUL: keys that the mask hides from all are not read, as they may be NaN."""
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    BLOCK_D: tl.constexpr = VARIANT.BLOCK_D
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for index in tl.range(0, (tile.cut - tile.whole) // BLOCK_N):
        n = tile.whole + index * BLOCK_N
        acc = _query_step(
            acc, tile, tile_do, row_lse, row_low, delta, k, v, n, scores, window, dropout, False, CAREFUL, VARIANT
        )
    begin = tile.low // BLOCK_N * BLOCK_N
    end = (tile.high + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    for index in tl.range(0, (tile.whole - begin + end - tile.cut) // BLOCK_N):
        n = masked_block(index, begin, tile.whole, tile.cut, BLOCK_N)
        acc = _query_step(
            acc, tile, tile_do, row_lse, row_low, delta, k, v, n, scores, window, dropout, True, CAREFUL, VARIANT
        )
    return acc


@triton.jit(do_not_specialize=VARYING)
def gradient_of_queries(
    q,
    k,
    v,
    dout,
    row_lse,
    delta,
    dq,
    heads,
    cu_seqlens_q,
    cu_seqlens_k,
    kv_lengths,
    batch,
    seqlen_q,
    seqlen_k,
    seqlen_new,
    window,
    scale,
    softcap,
    slopes,
    bias,
    mask,
    seed_low,
    seed_high,
    threshold,
    dropout_scale,
    VARIANT: tl.constexpr,
):
    """dQ of one tile of queries: 3 products of tiles per block of keys."""
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    BLOCK_D: tl.constexpr = VARIANT.BLOCK_D
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, kv_lengths, batch, seqlen_q, seqlen_k, seqlen_new)
    scores = Scores(scale, softcap, slopes, bias, mask)
    dropout = Dropout(seed_low, seed_high, threshold, dropout_scale)
    m_index, _, head, b = place(heads, sequences, None, VARIANT)
    _, queries = queries_of(sequences, b)
    if m_index * BLOCK_M >= queries:
        return
    tile = query_tile(q, k, v, heads, sequences, window, scores, None, m_index, head, b, VARIANT)
    WIDTH_V: tl.constexpr = VARIANT.PART * VARIANT.PARTS
    lse_rows, low_rows = exponents(row_lse, heads, sequences, VARIANT)
    rows = offset_of(lse_rows, b, head, tile.tokens)
    tile_lse = tl.load(lse_rows.data + rows, mask=tile.rows_ok, other=float("inf"))
    tile_low = tl.load(low_rows.data + rows, mask=tile.rows_ok, other=0.0)[:, None] if VARIANT.FLOAT32 else 0.0
    tile_delta = tl.load(delta + rows, mask=tile.rows_ok, other=0.0)[:, None]
    # The gradient of a row that sees nothing may be NaN.
    tile_do = load_rows(dout, b, head, tile.tokens, tile_lse != float("inf"), WIDTH_V, VARIANT.HEAD_DIM_V)
    tile_lse = tile_lse[:, None]
    acc = _over_keys(tile, tile_do, tile_lse, tile_low, tile_delta, k, v, scores, window, dropout, False, VARIANT)
    if scores.mask is not None:
        if any_nan(acc):
            acc = _over_keys(
                tile, tile_do, tile_lse, tile_low, tile_delta, k, v, scores, window, dropout, True, VARIANT
            )
    store_rows(dq, b, head, tile.tokens, tile.rows_ok, acc * scores.scale, 0, BLOCK_D, VARIANT.HEAD_DIM)


class KeyTile(NamedTuple):
    """A tile of keys and values and what sees it; keys past the last of the sequence are zeros."""

    k: Any  # (BLOCK_N, BLOCK_D)
    v: Any  # (BLOCK_N, padded head_dim_v)
    cols: Any  # (BLOCK_N,): positions from n on
    n: Any
    batch: Any
    kv_length: Any
    seqlen_q: Any
    start_q: Any
    low: Any  # queries before `low` or from `high` on see none of the keys
    high: Any
    whole: Any  # the blocks of queries from `whole` to `cut` need no mask
    cut: Any
    offset: Any


@triton.jit
def _key_step(
    dk,
    dv,
    tile,
    q,
    dout,
    row_lse,
    delta,
    head,
    m,
    heads,
    scores,
    window,
    dropout,
    MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """One block of queries, from m on, for a tile of keys. Tiles of scores have keys along their rows here."""
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    WIDTH_V: tl.constexpr = VARIANT.PART * VARIANT.PARTS
    rows = tl.arange(0, BLOCK_M)
    offs_m = m + rows
    ok = (offs_m >= tile.low) & (offs_m < tile.high)
    start = tile.start_q + m
    rows_lse = row_lse[0].data + offset_of(row_lse[0], tile.batch, head, start) + rows
    rows_low = row_lse[1].data + offset_of(row_lse[1], tile.batch, head, start) + rows
    rows_delta = delta.data + offset_of(delta, tile.batch, head, start) + rows
    if MASKED:
        tile_lse = tl.load(rows_lse, mask=ok, other=float("inf"))
        tile_low = tl.load(rows_low, mask=ok, other=0.0)[None, :] if VARIANT.FLOAT32 else 0.0
        tile_delta = tl.load(rows_delta, mask=ok, other=0.0)
    else:
        tile_lse = tl.load(rows_lse)
        tile_low = tl.load(rows_low)[None, :] if VARIANT.FLOAT32 else 0.0
        tile_delta = tl.load(rows_delta)
    if CAREFUL:
        ok = ok & (tile_lse != float("inf"))
    base_q = q.data + offset_of(q, tile.batch, head, start)
    base_do = dout.data + offset_of(dout, tile.batch, head, start)
    tile_q = load_block(q, base_q, rows, ok, MASKED or CAREFUL, 0, VARIANT.BLOCK_D, VARIANT.HEAD_DIM, VARIANT)
    tile_do = load_block(dout, base_do, rows, ok, MASKED or CAREFUL, 0, WIDTH_V, VARIANT.HEAD_DIM_V, VARIANT)
    if VARIANT.FLOAT32:  # summed up as in the forward pass: large scores must cancel against lse to the last digit
        products = tl.trans(tl.dot(tile_q, tl.trans(tile.k), input_precision=VARIANT.PRECISION))
    else:
        products = tl.dot(tile.k, tl.trans(tile_q), input_precision=VARIANT.PRECISION)
    dprobs = tl.dot(tile.v, tl.trans(tile_do), input_precision=VARIANT.PRECISION)

    i = tl.minimum(offs_m, tile.seqlen_q - 1)
    first, last = visible_keys(window, i, tile.offset, tile.kv_length)
    visible = tile.cols[:, None] <= (last - tile.n)[None, :]
    if window.left is not None:
        visible = visible & (tile.cols[:, None] >= (first - tile.n)[None, :])
    j = tl.minimum(tile.n + tile.cols, tl.maximum(tile.kv_length - 1, 0))
    probs, dscores, dproducts = gradient_of_scores(
        products,
        dprobs,
        tile_lse[None, :],
        tile_low,
        tile_delta[None, :],
        scores,
        dropout,
        tile.batch,
        head,
        tile.batch * heads.heads_q + head,
        i[None, :],
        j[:, None],
        tile.n,
        tile.offset,
        visible,
        MASKED,
        VARIANT,
    )
    dv = tl.dot(probs.to(tile_do.dtype), tile_do, dv, input_precision=VARIANT.PRECISION)
    dk = tl.dot(dproducts.to(tile_q.dtype), tile_q, dk, input_precision=VARIANT.PRECISION)
    return dk, dv


@triton.jit
def _over_queries(
    tile,
    q,
    dout,
    row_lse,
    delta,
    head_kv,
    heads,
    scores,
    window,
    dropout,
    CAREFUL: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """(dK but for the scale, dV) of a tile. CAREFUL: queries that see nothing are not read, as they may be NaN."""
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    BLOCK_D: tl.constexpr = VARIANT.BLOCK_D
    WIDTH_V: tl.constexpr = VARIANT.PART * VARIANT.PARTS
    begin = tile.low // BLOCK_M * BLOCK_M
    end = (tile.high + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, WIDTH_V), tl.float32)
    for member in tl.range(0, heads.group):
        head = head_kv * heads.group + member
        for index in tl.range(0, (tile.cut - tile.whole) // BLOCK_M):
            m = tile.whole + index * BLOCK_M
            dk, dv = _key_step(
                dk, dv, tile, q, dout, row_lse, delta, head, m, heads, scores, window, dropout, False, CAREFUL, VARIANT
            )
        for index in tl.range(0, (tile.whole - begin + end - tile.cut) // BLOCK_M):
            m = masked_block(index, begin, tile.whole, tile.cut, BLOCK_M)
            dk, dv = _key_step(
                dk, dv, tile, q, dout, row_lse, delta, head, m, heads, scores, window, dropout, True, CAREFUL, VARIANT
            )
    return dk, dv


@triton.jit(do_not_specialize=VARYING)
def gradient_of_keys(
    q,
    k,
    v,
    dout,
    row_lse,
    delta,
    dk,
    dv,
    heads,
    cu_seqlens_q,
    cu_seqlens_k,
    kv_lengths,
    batch,
    seqlen_q,
    seqlen_k,
    seqlen_new,
    window,
    scale,
    softcap,
    slopes,
    bias,
    mask,
    seed_low,
    seed_high,
    threshold,
    dropout_scale,
    VARIANT: tl.constexpr,
):
    """dK and dV of one tile of keys, summed over the query heads that share it: 4 products of tiles per block."""
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    BLOCK_D: tl.constexpr = VARIANT.BLOCK_D
    WIDTH_V: tl.constexpr = VARIANT.PART * VARIANT.PARTS
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, kv_lengths, batch, seqlen_q, seqlen_k, seqlen_new)
    scores = Scores(scale, softcap, slopes, bias, mask)
    dropout = Dropout(seed_low, seed_high, threshold, dropout_scale)
    tiles = (seqlen_k + BLOCK_N - 1) // BLOCK_N
    if cu_seqlens_k is not None:
        tiles = seqlen_k // BLOCK_N + batch + 1
    pid = tl.program_id(0)
    n_index = pid % tiles
    head_kv = pid // tiles % heads.heads_kv
    b = pid // tiles // heads.heads_kv
    if cu_seqlens_k is not None:
        b, n_index = tile_of(n_index, cu_seqlens_k, batch, BLOCK_N)
    start_q, queries = queries_of(sequences, b)
    start_k, keys, kv_length = keys_of(sequences, b)
    n = n_index * BLOCK_N
    if n >= keys:
        return
    cols = key_order(BLOCK_N, VARIANT.PERMUTED)
    exists = n + cols < kv_length
    offset = diagonal_offset(window, queries, kv_length)
    low, high, whole, cut = query_blocks(window, n, n + BLOCK_N - 1, offset, queries, kv_length, BLOCK_M)
    tokens = start_k + n + cols
    tile = KeyTile(
        k=load_rows(k, b, head_kv, tokens, exists, BLOCK_D, VARIANT.HEAD_DIM),
        v=load_rows(v, b, head_kv, tokens, exists, WIDTH_V, VARIANT.HEAD_DIM_V),
        cols=cols,
        n=n,
        batch=b,
        kv_length=kv_length,
        seqlen_q=queries,
        start_q=start_q,
        low=low,
        high=high,
        whole=whole,
        cut=cut,
        offset=offset,
    )
    lse_rows = exponents(row_lse, heads, sequences, VARIANT)
    delta_rows = row_array(delta, heads, sequences)
    acc_k, acc_v = _over_queries(
        tile, q, dout, lse_rows, delta_rows, head_kv, heads, scores, window, dropout, False, VARIANT
    )
    if scores.mask is not None or scores.bias is not None:
        if any_nan(acc_k) | any_nan(acc_v):
            acc_k, acc_v = _over_queries(
                tile, q, dout, lse_rows, delta_rows, head_kv, heads, scores, window, dropout, True, VARIANT
            )
    if dropout_scale is not None:
        acc_v = acc_v * dropout_scale
    # Keys that do not exist have gradients of 0; the zeros they were read as had probabilities.
    acc_k = tl.where(exists[:, None], acc_k * scores.scale, 0.0)
    acc_v = tl.where(exists[:, None], acc_v, 0.0)
    in_memory = n + cols < keys
    store_rows(dk, b, head_kv, tokens, in_memory, acc_k, 0, BLOCK_D, VARIANT.HEAD_DIM)
    store_rows(dv, b, head_kv, tokens, in_memory, acc_v, 0, WIDTH_V, VARIANT.HEAD_DIM_V)
