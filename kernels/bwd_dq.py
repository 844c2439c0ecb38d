"""The gradient of q: a program owns a tile of queries, and goes over the keys that it sees.

No atomics: dQ and dK/dV are two passes, each of which owns what it writes, so results are the same from run to run.
Both recompute the probabilities from lse: 7 products of tiles against the forward's 2, which bounds them.
Source: Dao, "FlashAttention-2" (2023).
"""

import triton
import triton.language as tl

from .arguments import VARYING, BwdRows, Dropout, KeysValues, Mask, ScoreMod, Sequences
from .block_info import masked_block, program_tile, q_offset_of, queries_of
from .bwd_preprocess import bwd_rows
from .bwd_scores import probs_and_dscores
from .mask import in_window
from .paged_kv import load_kv_block
from .query_tile import load_query_tile
from .score_mod import ScoreTile
from .tiles import any_nan, key_order, load_rows, offset_of, store_rows


@triton.jit
def _step(
    dq,
    tile,
    rows,
    kv,
    n,
    score_mod,
    mask,
    dropout,
    MASKED: tl.constexpr,
    SKIP_HIDDEN: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """One block of keys, from n on, for a tile of queries."""
    BLOCK_D: tl.constexpr = VARIANT.BLOCK_D
    HEAD_DIM: tl.constexpr = VARIANT.HEAD_DIM
    HEAD_DIM_V: tl.constexpr = VARIANT.HEAD_DIM_V
    WIDTH_V: tl.constexpr = VARIANT.PART * VARIANT.PARTS
    cols = key_order(VARIANT.BLOCK_N, VARIANT.PERMUTED)
    offs_n = n + cols
    ok = (offs_n >= tile.n_begin) & (offs_n < tile.n_end)
    tile_k = load_kv_block(kv.k, tile.base_k, tile.batch, n, cols, ok, None, MASKED, 0, BLOCK_D, HEAD_DIM, VARIANT)
    tile_v = load_kv_block(kv.v, tile.base_v, tile.batch, n, cols, ok, None, MASKED, 0, WIDTH_V, HEAD_DIM_V, VARIANT)
    products = tl.dot(tile.q, tl.trans(tile_k), input_precision=VARIANT.PRECISION)
    dprobs = tl.dot(rows.dout, tl.trans(tile_v), input_precision=VARIANT.PRECISION)
    visible = in_window(mask.window, tile.first_key, tile.last_key, cols, n)
    at = ScoreTile(tile.batch, tile.head, tile.row, tile.offs_m, offs_n[None, :], n, tile.diagonal_offset)
    _, _, dproducts = probs_and_dscores(products, dprobs, rows, score_mod, mask, dropout, at, visible, MASKED, VARIANT)
    if SKIP_HIDDEN:
        any_sees = tl.max((dproducts != 0).to(tl.int32), 0) != 0
        tile_k = load_kv_block(
            kv.k, tile.base_k, tile.batch, n, cols, any_sees, None, True, 0, BLOCK_D, HEAD_DIM, VARIANT
        )
    return tl.dot(dproducts.to(tile_k.dtype), tile_k, dq, input_precision=VARIANT.PRECISION)


@triton.jit
def _over_keys(tile, rows, kv, score_mod, mask, dropout, SKIP_HIDDEN: tl.constexpr, VARIANT: tl.constexpr):
    """dQ of a tile without the scale. SKIP_HIDDEN: keys that the mask hides from all are not read; they may be NaN."""
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    BLOCK_D: tl.constexpr = VARIANT.BLOCK_D
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for index in tl.range(0, (tile.full_end - tile.full_begin) // BLOCK_N):
        n = tile.full_begin + index * BLOCK_N
        acc = _step(acc, tile, rows, kv, n, score_mod, mask, dropout, False, SKIP_HIDDEN, VARIANT)
    begin = tile.n_begin // BLOCK_N * BLOCK_N
    end = (tile.n_end + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    for index in tl.range(0, (tile.full_begin - begin + end - tile.full_end) // BLOCK_N):
        n = masked_block(index, begin, tile.full_begin, tile.full_end, BLOCK_N)
        acc = _step(acc, tile, rows, kv, n, score_mod, mask, dropout, True, SKIP_HIDDEN, VARIANT)
    return acc


@triton.jit(do_not_specialize=VARYING)
def bwd_dq(
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
    VARIANT: tl.constexpr,
):
    """dQ of one tile of queries: 3 products of tiles per block of keys."""
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    BLOCK_D: tl.constexpr = VARIANT.BLOCK_D
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, kv_lengths, q_offset, batch, seqlen_q, seqlen_k, seqlen_new)
    score_mod = ScoreMod(scale, softcap, slopes, bias)
    mask = Mask(window, mask)
    kv = KeysValues(k, v, None, None, None)
    m_index, _, head, b = program_tile(heads, sequences, None, VARIANT)
    dropout = Dropout(seed_low, seed_high, threshold, dropout_scale, q_offset_of(sequences, b))
    _, queries = queries_of(sequences, b)
    if m_index * BLOCK_M >= queries:
        return
    tile = load_query_tile(q, k, v, heads, sequences, window, score_mod, None, m_index, head, b, VARIANT)
    WIDTH_V: tl.constexpr = VARIANT.PART * VARIANT.PARTS
    arrays = bwd_rows(dout, row_lse, delta, heads, sequences, VARIANT)
    at = offset_of(arrays.lse, b, head, tile.tokens)
    lse = tl.load(arrays.lse.data + at, mask=tile.rows_ok, other=float("inf"))
    residual = tl.load(arrays.lse_residual.data + at, mask=tile.rows_ok, other=0.0)[:, None] if VARIANT.FLOAT32 else 0.0
    tile_delta = tl.load(delta + at, mask=tile.rows_ok, other=0.0)[:, None]
    # The gradient of a row that sees nothing may be NaN.
    tile_do = load_rows(dout, b, head, tile.tokens, lse != float("inf"), WIDTH_V, VARIANT.HEAD_DIM_V)
    rows = BwdRows(tile_do, lse[:, None], residual, tile_delta)
    acc = _over_keys(tile, rows, kv, score_mod, mask, dropout, False, VARIANT)
    if mask.data is not None:
        if any_nan(acc):
            acc = _over_keys(tile, rows, kv, score_mod, mask, dropout, True, VARIANT)
    store_rows(dq, b, head, tile.tokens, tile.rows_ok, acc * score_mod.scale, 0, BLOCK_D, VARIANT.HEAD_DIM)
