"""The gradient of a bias, summed over the dimensions that it broadcasts, always in the same order."""

import triton
import triton.language as tl

from .arguments import VARYING, BwdRows, Dropout, Mask, ScoreMod, Sequences
from .block_info import diagonal_offset, key_blocks, keys_of, q_offset_of, queries_of
from .bwd_preprocess import bwd_rows
from .bwd_scores import probs_and_dscores
from .mask import in_window, visible_keys
from .score_mod import ScoreTile
from .tiles import key_order, load_rows, offset_of


@triton.jit(do_not_specialize=VARYING)
def bwd_dbias(
    q,
    k,
    v,
    dout,
    row_lse,
    delta,
    dbias,
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
    seed_low,
    seed_high,
    threshold,
    dropout_scale,
    batches,
    heads_out,
    tiles_m,
    tiles_n,
    ALL_BATCHES: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """One tile of dbias, which is float32; the scores and their gradients are computed anew.

    dbias: an Array of (batches, heads_out, tiles_m * BLOCK_M or tiles_m, tiles_n * BLOCK_N or 1).
    ALL_BATCHES, ALL_HEADS, ALL_ROWS: a program sums over all sequences, heads or blocks of queries.
    SUM_ROWS, SUM_COLUMNS: it also sums over the rows of its tile, or over all keys.
    """
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    BLOCK_D: tl.constexpr = VARIANT.BLOCK_D
    WIDTH_V: tl.constexpr = VARIANT.PART * VARIANT.PARTS
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, kv_lengths, q_offset, batch, seqlen_q, seqlen_k, seqlen_new)
    score_mod = ScoreMod(scale, softcap, slopes, bias)
    mask = Mask(window, mask)
    pid = tl.program_id(0)
    n_index = pid % tiles_n
    m_index = pid // tiles_n % tiles_m
    head_out = pid // tiles_n // tiles_m % heads_out
    b_out = pid // tiles_n // tiles_m // heads_out
    cols = key_order(BLOCK_N, VARIANT.PERMUTED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    arrays = bwd_rows(dout, row_lse, delta, heads, sequences, VARIANT)
    b_count = batch if ALL_BATCHES else batches * 0 + 1
    head_count = heads.heads_q if ALL_HEADS else batches * 0 + 1
    for b_index in tl.range(0, b_count):
        b = b_out + b_index
        dropout = Dropout(seed_low, seed_high, threshold, dropout_scale, q_offset_of(sequences, b))
        start_q, seqlen_q = queries_of(sequences, b)
        start_k, seqlen_k, kv_length = keys_of(sequences, b)
        offset = diagonal_offset(window, sequences, b, seqlen_q, kv_length)
        m_begin = m_index * BLOCK_M
        m_end = tl.minimum(seqlen_q, m_begin + BLOCK_M)
        if ALL_ROWS:
            m_end = seqlen_q
        for m in tl.range(m_begin, m_end, BLOCK_M):
            last_m = tl.minimum(m + BLOCK_M, seqlen_q) - 1
            offs_m = m + tl.arange(0, BLOCK_M)
            rows_ok = offs_m <= last_m
            i = tl.minimum(offs_m, last_m)
            first_key, last_key = visible_keys(window, i, offset, kv_length)
            last_key = tl.where(rows_ok, last_key, -1)
            n_begin, n_end, full_begin, full_end = key_blocks(window, m, last_m, offset, kv_length, BLOCK_N)
            begin = n_begin // BLOCK_N * BLOCK_N
            end = n_end
            if not SUM_COLUMNS:
                begin = tl.maximum(begin, n_index * BLOCK_N)
                end = tl.minimum(end, n_index * BLOCK_N + BLOCK_N)
            for head_index in tl.range(0, head_count):
                head = head_out + head_index
                head_kv = head // heads.group
                tokens = start_q + i
                tile_q = load_rows(q, b, head, tokens, rows_ok, BLOCK_D, VARIANT.HEAD_DIM)
                row_offsets = offset_of(arrays.lse, b, head, tokens)
                lse = tl.load(arrays.lse.data + row_offsets)
                residual = tl.load(arrays.lse_residual.data + row_offsets)[:, None] if VARIANT.FLOAT32 else 0.0
                # The gradient of a row that sees nothing may be NaN.
                sees = rows_ok & (lse != float("inf"))
                tile_do = load_rows(dout, b, head, tokens, sees, WIDTH_V, VARIANT.HEAD_DIM_V)
                rows = BwdRows(tile_do, lse[:, None], residual, tl.load(delta + row_offsets)[:, None])
                for n in tl.range(begin, end, BLOCK_N):
                    offs_n = n + cols
                    ok = (offs_n >= n_begin) & (offs_n < n_end)
                    tile_k = load_rows(k, b, head_kv, start_k + offs_n, ok, BLOCK_D, VARIANT.HEAD_DIM)
                    tile_v = load_rows(v, b, head_kv, start_k + offs_n, ok, WIDTH_V, VARIANT.HEAD_DIM_V)
                    products = tl.dot(tile_q, tl.trans(tile_k), input_precision=VARIANT.PRECISION)
                    dprobs = tl.dot(tile_do, tl.trans(tile_v), input_precision=VARIANT.PRECISION)
                    visible = in_window(window, first_key, last_key, cols, n)
                    row = b * heads.heads_q + head
                    at = ScoreTile(b, head, row, i[:, None], offs_n[None, :], n, offset)
                    probs, dscores, dproducts = probs_and_dscores(
                        products, dprobs, rows, score_mod, mask, dropout, at, visible, True, VARIANT
                    )
                    acc += dscores
    if SUM_COLUMNS:
        sums = tl.sum(acc, 1)
        if SUM_ROWS:
            tl.store(dbias.data + offset_of(dbias, b_out, head_out, m_index), tl.sum(sums, 0))
        else:
            rows = m_index * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(dbias.data + offset_of(dbias, b_out, head_out, rows), sums)
    else:
        columns = (n_index * BLOCK_N + cols).to(tl.int64) * dbias.column
        if SUM_ROWS:
            tl.store(dbias.data + offset_of(dbias, b_out, head_out, m_index) + columns, tl.sum(acc, 0))
        else:
            rows = dbias.data + offset_of(dbias, b_out, head_out, m_index * BLOCK_M + tl.arange(0, BLOCK_M))
            tl.store(rows[:, None] + columns[None, :], acc)
