"""The gradient of a bias, summed over the dimensions that it broadcasts, always in the same order."""

import triton
import triton.language as tl

from .arguments import VARYING, Dropout, Scores, Sequences
from .block_info import diagonal_offset, key_blocks, keys_of, queries_of, visible_keys
from .bwd_dkdv import exponents, gradient_of_scores
from .tiles import key_order, load_rows, offset_of


@triton.jit(do_not_specialize=VARYING)
def gradient_of_bias(
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

    dbias: an Array of (batches, heads_out, tiles_m * BLOCK_M or tiles_m, tiles_n * BLOCK_N or 1). A program sums over
    all sequences, heads or blocks of queries as the ALL_ arguments say, and over the rows or columns of its tile as
    the SUM_ arguments say; if over columns, over all keys.
    """
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    BLOCK_D: tl.constexpr = VARIANT.BLOCK_D
    WIDTH_V: tl.constexpr = VARIANT.PART * VARIANT.PARTS
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, kv_lengths, batch, seqlen_q, seqlen_k, seqlen_new)
    scores = Scores(scale, softcap, slopes, bias, mask)
    dropout = Dropout(seed_low, seed_high, threshold, dropout_scale)
    pid = tl.program_id(0)
    n_index = pid % tiles_n
    m_index = pid // tiles_n % tiles_m
    head_out = pid // tiles_n // tiles_m % heads_out
    b_out = pid // tiles_n // tiles_m // heads_out
    cols = key_order(BLOCK_N, VARIANT.PERMUTED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    lse_rows, low_rows = exponents(row_lse, heads, sequences, VARIANT)
    b_count = batch if ALL_BATCHES else batches * 0 + 1
    head_count = heads.heads_q if ALL_HEADS else batches * 0 + 1
    for b_index in tl.range(0, b_count):
        b = b_out + b_index
        start_q, seqlen_q = queries_of(sequences, b)
        start_k, seqlen_k, kv_length = keys_of(sequences, b)
        offset = diagonal_offset(window, seqlen_q, kv_length)
        m_begin = m_index * BLOCK_M
        m_end = tl.minimum(seqlen_q, m_begin + BLOCK_M)
        if ALL_ROWS:
            m_end = seqlen_q
        for m in tl.range(m_begin, m_end, BLOCK_M):
            last_m = tl.minimum(m + BLOCK_M, seqlen_q) - 1
            offs_m = m + tl.arange(0, BLOCK_M)
            rows_ok = offs_m <= last_m
            i = tl.minimum(offs_m, last_m)
            first, last = visible_keys(window, i, offset, kv_length)
            last = tl.where(rows_ok, last, -1)
            low, high, whole, cut = key_blocks(window, m, last_m, offset, kv_length, BLOCK_N)
            n_begin = low // BLOCK_N * BLOCK_N
            n_end = high
            if not SUM_COLUMNS:
                n_begin = tl.maximum(n_begin, n_index * BLOCK_N)
                n_end = tl.minimum(n_end, n_index * BLOCK_N + BLOCK_N)
            for head_index in tl.range(0, head_count):
                head = head_out + head_index
                head_kv = head // heads.group
                tokens = start_q + i
                tile_q = load_rows(q, b, head, tokens, rows_ok, BLOCK_D, VARIANT.HEAD_DIM)
                at = offset_of(lse_rows, b, head, tokens)
                tile_lse = tl.load(lse_rows.data + at)
                tile_low = tl.load(low_rows.data + at)[:, None] if VARIANT.FLOAT32 else 0.0
                # The gradient of a row that sees nothing may be NaN.
                sees = rows_ok & (tile_lse != float("inf"))
                tile_do = load_rows(dout, b, head, tokens, sees, WIDTH_V, VARIANT.HEAD_DIM_V)
                tile_lse = tile_lse[:, None]
                tile_delta = tl.load(delta + at)[:, None]
                for n in tl.range(n_begin, n_end, BLOCK_N):
                    offs_n = n + cols
                    ok = (offs_n >= low) & (offs_n < high)
                    tile_k = load_rows(k, b, head_kv, start_k + offs_n, ok, BLOCK_D, VARIANT.HEAD_DIM)
                    tile_v = load_rows(v, b, head_kv, start_k + offs_n, ok, WIDTH_V, VARIANT.HEAD_DIM_V)
                    products = tl.dot(tile_q, tl.trans(tile_k), input_precision=VARIANT.PRECISION)
                    dprobs = tl.dot(tile_do, tl.trans(tile_v), input_precision=VARIANT.PRECISION)
                    visible = (cols[None, :] <= (last - n)[:, None]) & (cols[None, :] >= (first - n)[:, None])
                    row = b * heads.heads_q + head
                    probs, dscores, dproducts = gradient_of_scores(
                        products,
                        dprobs,
                        tile_lse,
                        tile_low,
                        tile_delta,
                        scores,
                        dropout,
                        b,
                        head,
                        row,
                        i[:, None],
                        offs_n[None, :],
                        n,
                        offset,
                        visible,
                        True,
                        VARIANT,
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
