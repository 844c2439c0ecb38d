"""The forward kernel: fused attention for dense, varlen and cached calls, and for the splits of a long list of keys.

Reads q once and K, V once per tile of queries, writes out and lse. A score costs 4 * D flops and one exponential, so
tensor cores (at head_dim 64 together with the exponentials) bound it, and memory where there are few queries. No matrix
of scores exists anywhere.
Source: Dao, "FlashAttention-2" (2023); splits of the keys: Dao et al., "Flash-Decoding" (2023).
"""

import triton
import triton.language as tl

from .arguments import VARYING, Array, Dropout, Scores, Sequences
from .block_info import masked_block, queries_of
from .online_softmax import finish, merge, split_lse, start, update
from .query_tile import load_keys, place, query_tile, rows_per_query, visible_to
from .score_mod import kept, seen, transform, unit_of_scores
from .tiles import any_nan, key_order, load_tile, offset_of, rounded_off, row_array, store_rows


@triton.jit
def _step(
    state,
    tile,
    k,
    v,
    k_map,
    v_map,
    n,
    scores,
    window,
    dropout,
    paging,
    MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """One block of keys, from n on: products, scores, probabilities, values."""
    acc, row_max, row_sum = state
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    PART: tl.constexpr = VARIANT.PART
    PARTS: tl.constexpr = VARIANT.PARTS
    cols = key_order(BLOCK_N, VARIANT.PERMUTED)
    offs_n = n + cols
    ok = (offs_n >= tile.low) & (offs_n < tile.high)
    BLOCK_D: tl.constexpr = VARIANT.BLOCK_D
    if k_map is not None and not MASKED:
        tile_k = k_map.load([tile.batch, tile.head_kv, n, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        tile_k = load_keys(
            k, tile.base_k, tile.batch, n, cols, ok, paging, MASKED, 0, BLOCK_D, VARIANT.HEAD_DIM, VARIANT
        )
    s = tl.dot(tile.q, tl.trans(tile_k), input_precision=VARIANT.PRECISION)

    visible = visible_to(tile, window, cols, n)
    if not VARIANT.PLAIN:
        s, _ = transform(
            s, scores, tile.batch, tile.head, tile.offs_m, offs_n[None, :], tile.offset, visible, MASKED, VARIANT
        )
    if scores.mask is not None:
        visible = seen(scores, tile.batch, tile.head, tile.offs_m, offs_n[None, :], visible, MASKED)
        if CAREFUL:
            ok = tl.max(visible.to(tl.int32), 0) != 0
    if MASKED or scores.mask is not None:
        s = tl.where(visible, s, -float("inf"))

    row_max, row_sum, acc, probs = update(row_max, row_sum, acc, s, tile.factor, PARTS, VARIANT)
    if dropout.threshold is not None:
        probs = tl.where(kept(dropout, tile.offs_m, tile.row, n, BLOCK_N), probs, 0.0)
    total = ()
    for part in tl.static_range(PARTS):
        if v_map is not None and not (MASKED or CAREFUL):
            tile_v = v_map.load([tile.batch, tile.head_kv, n, part * PART]).reshape(BLOCK_N, PART)
        else:
            tile_v = load_keys(
                v,
                tile.base_v,
                tile.batch,
                n,
                cols,
                ok,
                paging,
                MASKED or CAREFUL,
                part * PART,
                PART,
                VARIANT.HEAD_DIM_V,
                VARIANT,
            )
        total = total + (tl.dot(probs.to(tile_v.dtype), tile_v, acc[part], input_precision=VARIANT.PRECISION),)
    return total, row_max, row_sum


@triton.jit
def _attend(
    tile,
    k,
    v,
    k_map,
    v_map,
    begin,
    end,
    whole,
    cut,
    scores,
    window,
    dropout,
    paging,
    CAREFUL: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """(acc, row_max, row_sum) over the keys from begin to end: blocks that need no mask first, then the others.

    CAREFUL: values that the mask hides from all are not read, as a probability of 0 would not hide a NaN.
    """
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    PART: tl.constexpr = VARIANT.PART
    PARTS: tl.constexpr = VARIANT.PARTS
    SUMS: tl.constexpr = VARIANT.SUMS
    row_max, row_sum = start(tile.factor, BLOCK_M, SUMS)
    acc = ()
    for _ in tl.static_range(PARTS):
        acc = acc + (tl.zeros((BLOCK_M, PART), tl.float32),)
    state = (acc, row_max, row_sum)
    for index in tl.range(0, (cut - whole) // BLOCK_N):
        n = whole + index * BLOCK_N
        state = _step(state, tile, k, v, k_map, v_map, n, scores, window, dropout, paging, False, CAREFUL, VARIANT)
    for index in tl.range(0, (whole - begin + end - cut) // BLOCK_N):
        n = masked_block(index, begin, whole, cut, BLOCK_N)
        state = _step(state, tile, k, v, k_map, v_map, n, scores, window, dropout, paging, True, CAREFUL, VARIANT)
    return state


@triton.jit(do_not_specialize=VARYING)
def forward(
    q,
    k,
    v,
    k_map,
    v_map,
    out,
    lse,
    out_residual,
    lse_residual,
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
    sinks,
    seed_low,
    seed_high,
    threshold,
    dropout_scale,
    paging,
    rotation,
    splits,
    stride_out,
    stride_lse,
    VARIANT: tl.constexpr,
):
    """One tile of queries, or one split of its keys. The grid is flat: tiles, splits, heads, sequences.

    k_map, v_map: tensor descriptors of k and v, through which the copy engines of Hopper and its successors load whole
    blocks, or None. With `splits`, their number, out and lse are float32 and hold the result over the split's keys
    alone, without the sinks; those of the next split are stride_out and stride_lse further on. out_residual,
    lse_residual: what rounding took from these, or None; inf in rows that see nothing but a sink.
    """
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    PART: tl.constexpr = VARIANT.PART
    PARTS: tl.constexpr = VARIANT.PARTS
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, kv_lengths, batch, seqlen_q, seqlen_k, seqlen_new)
    scores = Scores(scale, softcap, slopes, bias, mask)
    dropout = Dropout(seed_low, seed_high, threshold, dropout_scale)
    m_index, split, head, b = place(heads, sequences, splits, VARIANT)
    _, queries = queries_of(sequences, b)
    if m_index * BLOCK_M >= queries * rows_per_query(heads, VARIANT):
        return
    tile = query_tile(q, k, v, heads, sequences, window, scores, rotation, m_index, head, b, VARIANT)
    whole = tile.whole
    cut = tile.cut
    begin = tile.low // BLOCK_N * BLOCK_N
    end = (tile.high + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    if splits is not None:
        share = ((end - begin) // BLOCK_N + splits - 1) // splits * BLOCK_N
        begin = tl.minimum(begin + split * share, end)
        end = tl.minimum(begin + share, end)
        whole = tl.minimum(tl.maximum(whole, begin), end)
        cut = tl.minimum(tl.maximum(cut, begin), end)

    acc, row_max, row_sum = _attend(
        tile, k, v, k_map, v_map, begin, end, whole, cut, scores, window, dropout, paging, False, VARIANT
    )
    if scores.mask is not None:
        # Only a NaN that may have come from what the mask hides makes the care worth its price.
        bad = any_nan(acc[0])
        for part in tl.static_range(1, PARTS):
            bad = bad | any_nan(acc[part])
        if bad:
            acc, row_max, row_sum = _attend(
                tile, k, v, k_map, v_map, begin, end, whole, cut, scores, window, dropout, paging, True, VARIANT
            )
    TYPE: tl.constexpr = tl.float32 if lse_residual is None else tl.float64
    row_lse, normalizer = finish(row_max, row_sum, unit_of_scores(scores, VARIANT), TYPE)
    saw_nothing = row_lse == -float("inf")
    lse_rows = offset_of(row_array(lse, heads, sequences), b, tile.heads, tile.tokens)
    out_data = out.data
    if splits is not None:
        lse_rows += split.to(tl.int64) * stride_lse
        out_data += split.to(tl.int64) * stride_out
    elif sinks is not None:
        # Rows behind the last sequence belong to none, and have no sink.
        sink = tl.where(b < batch, tl.load(sinks + tile.heads), -float("inf")).to(TYPE)
        row_lse, share, _ = merge(row_lse, sink)
        row_lse = tl.where(saw_nothing, sink, row_lse)  # also one that is infinite
        normalizer = tl.where(saw_nothing, 0.0, normalizer * share)  # also of a sink that is NaN
    if dropout_scale is not None:
        normalizer *= dropout_scale
    row_lse, row_residual = split_lse(row_lse)
    tl.store(lse + lse_rows, row_lse, mask=tile.rows_ok)
    if lse_residual is not None:
        row_residual = tl.where(saw_nothing, float("inf"), row_residual)
        tl.store(lse_residual + lse_rows, row_residual, mask=tile.rows_ok)
    to = Array(out_data, out.batch, out.head, out.row, out.column)
    for part in tl.static_range(PARTS):
        result = acc[part] * normalizer[:, None]
        store_rows(to, b, tile.heads, tile.tokens, tile.rows_ok, result, part * PART, PART, VARIANT.HEAD_DIM_V)
        if out_residual is not None:
            low = rounded_off(result, out.data.dtype.element_ty)
            if sinks is not None:
                low = tl.where(saw_nothing[:, None], float("inf"), low)
            store_rows(
                out_residual, b, tile.heads, tile.tokens, tile.rows_ok, low, part * PART, PART, VARIANT.HEAD_DIM_V
            )


@triton.jit(do_not_specialize=VARYING)
def combine(
    partial_out,
    partial_lse,
    partial_residual,
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
    """Merges the splits, always in the same order. Reads and writes each number once: memory bounds it.

    partial_out: (splits, batch, heads_q, seqlen_q, DIM), partial_lse and, with lse_residual, partial_residual: (splits,
    batch, heads_q, seqlen_q), float32; lse and lse_residual are contiguous as well.
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
        part_lse = tl.load(partial_lse + split * stride_lse + offs_r, mask=ok, other=-float("inf")).to(TYPE)
        if lse_residual is not None:
            part_lse += tl.load(partial_residual + split * stride_lse + offs_r, mask=ok, other=0.0)
        part = load_tile(partial_out + split * stride_out, offs_r.to(tl.int64) * DIM, 1, ok, True, 0, BLOCK_D, DIM)
        total, old, new = merge(total, part_lse)
        acc = acc * old[:, None] + part * new[:, None]
    saw_nothing = total == -float("inf")
    if sinks is not None:
        sink = tl.load(sinks + head).to(TYPE)
        total, share, _ = merge(total, sink)
        total = tl.where(saw_nothing, sink, total)
        acc = tl.where(saw_nothing[:, None], 0.0, acc * share[:, None])
    store_rows(out, b, head, offs_m, ok, acc, 0, BLOCK_D, DIM)
    if out_residual is not None:
        low = rounded_off(acc, out.data.dtype.element_ty)
        if sinks is not None:
            low = tl.where(saw_nothing[:, None], float("inf"), low)
        store_rows(out_residual, b, head, offs_m, ok, low, 0, BLOCK_D, DIM)
    total, residual = split_lse(total)
    tl.store(lse + offs_r, total, mask=ok)
    if lse_residual is not None:
        tl.store(lse_residual + offs_r, tl.where(saw_nothing, float("inf"), residual), mask=ok)
