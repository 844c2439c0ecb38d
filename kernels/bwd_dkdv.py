"""The gradients of k and v: a program owns a tile of keys, and goes over the queries that see it; see bwd_dq.py."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import VARYING, BwdRows, Dropout, Mask, ScoreMod, Sequences
from .block_info import diagonal_offset, keys_of, masked_block, q_offset_of, queries_of, query_blocks, varlen_tile
from .bwd_preprocess import bwd_rows
from .bwd_scores import probs_and_dscores
from .mask import in_window, visible_keys
from .score_mod import ScoreTile
from .tiles import any_nan, key_order, load_block, load_rows, offset_of, store_rows


class KeyTile(NamedTuple):
    """A tile of keys and values, and which queries see it; keys past the last of the sequence are zeros."""

    k: Any  # (BLOCK_N, BLOCK_D)
    v: Any  # (BLOCK_N, padded head_dim_v)
    cols: Any  # (BLOCK_N,): positions from n on
    n: Any
    batch: Any
    heads_q: Any
    kv_length: Any
    seqlen_q: Any
    start_q: Any
    m_begin: Any  # see block_info.query_blocks
    m_end: Any
    full_begin: Any
    full_end: Any
    diagonal_offset: Any  # the key at which query 0 stands


@triton.jit
def _load_rows_of_step(rows, tile, head, start, offs, ok, MASKED: tl.constexpr, VARIANT: tl.constexpr):
    """(lse, lse_residual, delta) of the queries start + offs of a head; lse_residual is a row, the others 1-D."""
    lse = rows.lse.data + offset_of(rows.lse, tile.batch, head, start) + offs
    residual = rows.lse_residual.data + offset_of(rows.lse_residual, tile.batch, head, start) + offs
    delta = rows.delta.data + offset_of(rows.delta, tile.batch, head, start) + offs
    if MASKED:
        tile_lse = tl.load(lse, mask=ok, other=float("inf"))
        tile_residual = tl.load(residual, mask=ok, other=0.0)[None, :] if VARIANT.FLOAT32 else 0.0
        tile_delta = tl.load(delta, mask=ok, other=0.0)
    else:
        tile_lse = tl.load(lse)
        tile_residual = tl.load(residual)[None, :] if VARIANT.FLOAT32 else 0.0
        tile_delta = tl.load(delta)
    return tile_lse, tile_residual, tile_delta


@triton.jit
def _step(
    grads,
    tile,
    q,
    rows,
    head,
    m,
    score_mod,
    mask,
    dropout,
    MASKED: tl.constexpr,
    SKIP_HIDDEN: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """(dk, dv) with one block of queries, from m on. Tiles of scores have keys along their rows here."""
    dk, dv = grads
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    WIDTH_V: tl.constexpr = VARIANT.PART * VARIANT.PARTS
    offs = tl.arange(0, BLOCK_M)
    offs_m = m + offs
    ok = (offs_m >= tile.m_begin) & (offs_m < tile.m_end)
    start = tile.start_q + m
    tile_lse, tile_residual, tile_delta = _load_rows_of_step(rows, tile, head, start, offs, ok, MASKED, VARIANT)
    if SKIP_HIDDEN:
        ok = ok & (tile_lse != float("inf"))
    base_q = q.data + offset_of(q, tile.batch, head, start)
    base_do = rows.dout.data + offset_of(rows.dout, tile.batch, head, start)
    CHECK_ROWS: tl.constexpr = MASKED or SKIP_HIDDEN
    tile_q = load_block(q, base_q, offs, ok, CHECK_ROWS, 0, VARIANT.BLOCK_D, VARIANT.HEAD_DIM, VARIANT)
    tile_do = load_block(rows.dout, base_do, offs, ok, CHECK_ROWS, 0, WIDTH_V, VARIANT.HEAD_DIM_V, VARIANT)
    if VARIANT.FLOAT32:  # added up as in the forward pass: large scores must cancel against lse to the last digit
        products = tl.trans(tl.dot(tile_q, tl.trans(tile.k), input_precision=VARIANT.PRECISION))
    else:
        products = tl.dot(tile.k, tl.trans(tile_q), input_precision=VARIANT.PRECISION)
    dprobs = tl.dot(tile.v, tl.trans(tile_do), input_precision=VARIANT.PRECISION)

    i = tl.minimum(offs_m, tile.seqlen_q - 1)
    first_key, last_key = visible_keys(mask.window, i, tile.diagonal_offset, tile.kv_length)
    visible = in_window(mask.window, first_key, last_key, tile.cols, tile.n, True)
    j = tl.minimum(tile.n + tile.cols, tl.maximum(tile.kv_length - 1, 0))
    row = tile.batch * tile.heads_q + head
    at = ScoreTile(tile.batch, head, row, i[None, :], j[:, None], tile.n, tile.diagonal_offset)
    of_queries = BwdRows(tile_do, tile_lse[None, :], tile_residual, tile_delta[None, :])
    probs, _, dproducts = probs_and_dscores(
        products, dprobs, of_queries, score_mod, mask, dropout, at, visible, MASKED, VARIANT
    )
    dv = tl.dot(probs.to(tile_do.dtype), tile_do, dv, input_precision=VARIANT.PRECISION)
    dk = tl.dot(dproducts.to(tile_q.dtype), tile_q, dk, input_precision=VARIANT.PRECISION)
    return dk, dv


@triton.jit
def _over_queries(
    tile,
    q,
    rows,
    head_kv,
    heads,
    score_mod,
    mask,
    dropout,
    SKIP_HIDDEN: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """(dK without the scale, dV) of a tile. SKIP_HIDDEN: queries that see nothing are not read; they may be NaN."""
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    BLOCK_D: tl.constexpr = VARIANT.BLOCK_D
    WIDTH_V: tl.constexpr = VARIANT.PART * VARIANT.PARTS
    begin = tile.m_begin // BLOCK_M * BLOCK_M
    end = (tile.m_end + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    grads = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, WIDTH_V), tl.float32)
    for member in tl.range(0, heads.group):
        head = head_kv * heads.group + member
        for index in tl.range(0, (tile.full_end - tile.full_begin) // BLOCK_M):
            m = tile.full_begin + index * BLOCK_M
            grads = _step(grads, tile, q, rows, head, m, score_mod, mask, dropout, False, SKIP_HIDDEN, VARIANT)
        for index in tl.range(0, (tile.full_begin - begin + end - tile.full_end) // BLOCK_M):
            m = masked_block(index, begin, tile.full_begin, tile.full_end, BLOCK_M)
            grads = _step(grads, tile, q, rows, head, m, score_mod, mask, dropout, True, SKIP_HIDDEN, VARIANT)
    return grads


@triton.jit(do_not_specialize=VARYING)
def bwd_dkdv(
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
    """dK and dV of one tile of keys, summed over the query heads that share it: 4 products of tiles per block."""
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    BLOCK_D: tl.constexpr = VARIANT.BLOCK_D
    WIDTH_V: tl.constexpr = VARIANT.PART * VARIANT.PARTS
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, kv_lengths, q_offset, batch, seqlen_q, seqlen_k, seqlen_new)
    score_mod = ScoreMod(scale, softcap, slopes, bias)
    mask = Mask(window, mask)
    tiles = (seqlen_k + BLOCK_N - 1) // BLOCK_N
    if cu_seqlens_k is not None:
        tiles = seqlen_k // BLOCK_N + batch + 1
    pid = tl.program_id(0)
    n_index = pid % tiles
    head_kv = pid // tiles % heads.heads_kv
    b = pid // tiles // heads.heads_kv
    if cu_seqlens_k is not None:
        b, n_index = varlen_tile(n_index, cu_seqlens_k, batch, BLOCK_N)
    dropout = Dropout(seed_low, seed_high, threshold, dropout_scale, q_offset_of(sequences, b))
    start_q, queries = queries_of(sequences, b)
    start_k, keys, kv_length = keys_of(sequences, b)
    n = n_index * BLOCK_N
    if n >= keys:
        return
    cols = key_order(BLOCK_N, VARIANT.PERMUTED)
    exists = n + cols < kv_length
    offset = diagonal_offset(window, sequences, b, queries, kv_length)
    m_begin, m_end, full_begin, full_end = query_blocks(window, n, n + BLOCK_N - 1, offset, queries, kv_length, BLOCK_M)
    tokens = start_k + n + cols
    tile = KeyTile(
        k=load_rows(k, b, head_kv, tokens, exists, BLOCK_D, VARIANT.HEAD_DIM),
        v=load_rows(v, b, head_kv, tokens, exists, WIDTH_V, VARIANT.HEAD_DIM_V),
        cols=cols,
        n=n,
        batch=b,
        heads_q=heads.heads_q,
        kv_length=kv_length,
        seqlen_q=queries,
        start_q=start_q,
        m_begin=m_begin,
        m_end=m_end,
        full_begin=full_begin,
        full_end=full_end,
        diagonal_offset=offset,
    )
    rows = bwd_rows(dout, row_lse, delta, heads, sequences, VARIANT)
    acc_k, acc_v = _over_queries(tile, q, rows, head_kv, heads, score_mod, mask, dropout, False, VARIANT)
    if mask.data is not None or score_mod.bias is not None:
        if any_nan(acc_k) | any_nan(acc_v):
            acc_k, acc_v = _over_queries(tile, q, rows, head_kv, heads, score_mod, mask, dropout, True, VARIANT)
    if dropout_scale is not None:
        acc_v = acc_v * dropout_scale
    # Keys that do not exist have gradients of 0; the zeros they were read as had probabilities.
    acc_k = tl.where(exists[:, None], acc_k * score_mod.scale, 0.0)
    acc_v = tl.where(exists[:, None], acc_v, 0.0)
    in_memory = n + cols < keys
    store_rows(dk, b, head_kv, tokens, in_memory, acc_k, 0, BLOCK_D, VARIANT.HEAD_DIM)
    store_rows(dv, b, head_kv, tokens, in_memory, acc_v, 0, WIDTH_V, VARIANT.HEAD_DIM_V)
