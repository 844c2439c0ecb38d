"""The forward kernel: fused attention for dense, varlen and cached calls, and for the splits of a long list of keys.

Reads q once, reads K and V once per tile of queries, writes out and lse. No matrix of scores exists anywhere.
A score costs 4 * D flops and one exponential. What bounds the kernel:
* tensor cores (at head_dim 64 together with the exponentials);
* memory where there are few queries.
Source: Dao, "FlashAttention-2" (2023); splits of the keys: Dao et al., "Flash-Decoding" (2023).
"""

import triton
import triton.language as tl

from .arguments import VARYING, Array, Dropout, KeysValues, Mask, ScoreMod, Sequences
from .block_info import masked_block, program_tile, q_offset_of, queries_of, rows_per_query
from .dropout import keep_mask
from .mask import apply_mask, in_window, load_mask
from .online_softmax import combine_lse, finalize, init, split_lse, update
from .paged_kv import load_kv_block
from .query_tile import load_query_tile
from .score_mod import ScoreTile, apply_score_mod, unit_of_scores
from .tiles import any_nan, key_order, offset_of, rounding_error, row_array, store_rows


@triton.jit
def _step(
    state,
    tile,
    kv,
    n,
    score_mod,
    mask,
    dropout,
    MASKED: tl.constexpr,
    SKIP_HIDDEN: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """One block of keys, from n on: products, scores, probabilities, values."""
    acc, row_max, row_sum = state
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    PART: tl.constexpr = VARIANT.PART
    PARTS: tl.constexpr = VARIANT.PARTS
    cols = key_order(BLOCK_N, VARIANT.PERMUTED)
    offs_n = n + cols
    ok = (offs_n >= tile.n_begin) & (offs_n < tile.n_end)
    BLOCK_D: tl.constexpr = VARIANT.BLOCK_D
    if kv.k_map is not None and not MASKED:
        tile_k = kv.k_map.load([tile.batch, tile.head_kv, n, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        tile_k = load_kv_block(
            kv.k, tile.base_k, tile.batch, n, cols, ok, kv.paging, MASKED, 0, BLOCK_D, VARIANT.HEAD_DIM, VARIANT
        )
    s = tl.dot(tile.q, tl.trans(tile_k), input_precision=VARIANT.PRECISION)

    visible = in_window(mask.window, tile.first_key, tile.last_key, cols, n)
    at = ScoreTile(tile.batch, tile.head, tile.row, tile.offs_m, offs_n[None, :], n, tile.diagonal_offset)
    if VARIANT.HAS_SCORE_MOD:
        s, _ = apply_score_mod(s, score_mod, at, visible, MASKED, VARIANT)
    visible = load_mask(mask, at, visible, MASKED)
    if SKIP_HIDDEN:
        ok = tl.max(visible.to(tl.int32), 0) != 0
    s = apply_mask(mask, s, visible, -float("inf"), MASKED)

    row_max, row_sum, acc, probs = update(row_max, row_sum, acc, s, tile.scale_log2, PARTS, VARIANT)
    if dropout.threshold is not None:
        probs = tl.where(keep_mask(dropout, tile.offs_m, tile.row, n, BLOCK_N), probs, 0.0)
    total = ()
    for part in tl.static_range(PARTS):
        if kv.v_map is not None and not (MASKED or SKIP_HIDDEN):
            tile_v = kv.v_map.load([tile.batch, tile.head_kv, n, part * PART]).reshape(BLOCK_N, PART)
        else:
            tile_v = load_kv_block(
                kv.v,
                tile.base_v,
                tile.batch,
                n,
                cols,
                ok,
                kv.paging,
                MASKED or SKIP_HIDDEN,
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
    kv,
    begin,
    full_begin,
    full_end,
    end,
    score_mod,
    mask,
    dropout,
    SKIP_HIDDEN: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """(acc, row_max, row_sum) over the keys from begin to end: full blocks first, then masked ones.

    SKIP_HIDDEN: values that the mask hides from all queries are not read, as a probability of 0 times NaN is NaN.
    """
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    PART: tl.constexpr = VARIANT.PART
    PARTS: tl.constexpr = VARIANT.PARTS
    ROW_SUMS: tl.constexpr = VARIANT.ROW_SUMS
    row_max, row_sum = init(tile.scale_log2, BLOCK_M, ROW_SUMS)
    acc = ()
    for _ in tl.static_range(PARTS):
        acc = acc + (tl.zeros((BLOCK_M, PART), tl.float32),)
    state = (acc, row_max, row_sum)
    for index in tl.range(0, (full_end - full_begin) // BLOCK_N):
        n = full_begin + index * BLOCK_N
        state = _step(state, tile, kv, n, score_mod, mask, dropout, False, SKIP_HIDDEN, VARIANT)
    for index in tl.range(0, (full_begin - begin + end - full_end) // BLOCK_N):
        n = masked_block(index, begin, full_begin, full_end, BLOCK_N)
        state = _step(state, tile, kv, n, score_mod, mask, dropout, True, SKIP_HIDDEN, VARIANT)
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
    q_offset,
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

    k_map, v_map: tensor descriptors of k and v, through which Hopper's copy engines load full blocks, or None.
    splits: their number, or None. With splits, out and lse are float32 and hold the result over the split's keys alone,
    without the sinks; those of the next split are stride_out and stride_lse further on.
    out_residual, lse_residual: rounding errors of out and lse, or None; inf in rows that see nothing but a sink.
    """
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    PART: tl.constexpr = VARIANT.PART
    PARTS: tl.constexpr = VARIANT.PARTS
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, kv_lengths, q_offset, batch, seqlen_q, seqlen_k, seqlen_new)
    score_mod = ScoreMod(scale, softcap, slopes, bias)
    mask = Mask(window, mask)
    kv = KeysValues(k, v, k_map, v_map, paging)
    m_index, split, head, b = program_tile(heads, sequences, splits, VARIANT)
    dropout = Dropout(seed_low, seed_high, threshold, dropout_scale, q_offset_of(sequences, b))
    _, queries = queries_of(sequences, b)
    if m_index * BLOCK_M >= queries * rows_per_query(heads, VARIANT):
        return
    tile = load_query_tile(q, k, v, heads, sequences, window, score_mod, rotation, m_index, head, b, VARIANT)
    full_begin = tile.full_begin
    full_end = tile.full_end
    begin = tile.n_begin // BLOCK_N * BLOCK_N
    end = (tile.n_end + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    if splits is not None:
        share = ((end - begin) // BLOCK_N + splits - 1) // splits * BLOCK_N
        begin = tl.minimum(begin + split * share, end)
        end = tl.minimum(begin + share, end)
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.minimum(tl.maximum(full_end, begin), end)

    acc, row_max, row_sum = _attend(
        tile, kv, begin, full_begin, full_end, end, score_mod, mask, dropout, False, VARIANT
    )
    if mask.data is not None:
        # Reading only what is visible is slow, and needed only where a NaN may have come from a hidden value.
        bad = any_nan(acc[0])
        for part in tl.static_range(1, PARTS):
            bad = bad | any_nan(acc[part])
        if bad:
            acc, row_max, row_sum = _attend(
                tile, kv, begin, full_begin, full_end, end, score_mod, mask, dropout, True, VARIANT
            )
    TYPE: tl.constexpr = tl.float32 if lse_residual is None else tl.float64
    row_lse, normalizer = finalize(row_max, row_sum, unit_of_scores(score_mod, VARIANT), TYPE)
    saw_nothing = row_lse == -float("inf")
    lse_rows = offset_of(row_array(lse, heads, sequences), b, tile.heads, tile.tokens)
    out_data = out.data
    if splits is not None:
        lse_rows += split.to(tl.int64) * stride_lse
        out_data += split.to(tl.int64) * stride_out
    elif sinks is not None:
        # Rows after the last sequence belong to none, and have no sink.
        sink = tl.where(b < batch, tl.load(sinks + tile.heads), -float("inf")).to(TYPE)
        row_lse, share, _ = combine_lse(row_lse, sink)
        row_lse = tl.where(saw_nothing, sink, row_lse)  # also an infinite sink
        normalizer = tl.where(saw_nothing, 0.0, normalizer * share)  # also of a sink that is NaN
    if dropout_scale is not None:
        normalizer *= dropout_scale
    row_lse, row_lse_residual = split_lse(row_lse)
    tl.store(lse + lse_rows, row_lse, mask=tile.rows_ok)
    if lse_residual is not None:
        row_lse_residual = tl.where(saw_nothing, float("inf"), row_lse_residual)
        tl.store(lse_residual + lse_rows, row_lse_residual, mask=tile.rows_ok)
    to = Array(out_data, out.batch, out.head, out.row, out.column)
    for part in tl.static_range(PARTS):
        result = acc[part] * normalizer[:, None]
        store_rows(to, b, tile.heads, tile.tokens, tile.rows_ok, result, part * PART, PART, VARIANT.HEAD_DIM_V)
        if out_residual is not None:
            error = rounding_error(result, out.data.dtype.element_ty)
            if sinks is not None:
                error = tl.where(saw_nothing[:, None], float("inf"), error)
            store_rows(
                out_residual, b, tile.heads, tile.tokens, tile.rows_ok, error, part * PART, PART, VARIANT.HEAD_DIM_V
            )
