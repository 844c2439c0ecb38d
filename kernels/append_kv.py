"""Appends new keys and values to a cache, contiguous or paged, and rotates the keys on the way."""

import triton
import triton.language as tl

from .arguments import VARYING, Sequences
from .block_info import keys_of
from .paged_kv import page_and_slot
from .rotary import load_rotated
from .tiles import load_rows, offset_of, store_rows


@triton.jit(do_not_specialize=VARYING)
def append_kv(
    k_new, v_new, k, v, heads, kv_lengths, batch, seqlen_k, seqlen_new, paging, rotation, VARIANT: tl.constexpr
):
    """One block of new keys of one head and sequence. Each number is read and written once, so memory bounds it.

    k_new, v_new: Arrays of (batch, heads_kv, seqlen_new, head_dim or head_dim_v).
    Key number j of sequence b is written to position kv_lengths[b] + j, to which it is also rotated.
    """
    BLOCK_N: tl.constexpr = VARIANT.BLOCK_N
    sequences = Sequences(None, None, kv_lengths, None, batch, seqlen_new, seqlen_k, seqlen_new)
    tiles = (seqlen_new + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    offs_n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    head = pid // tiles % heads.heads_kv
    b = pid // tiles // heads.heads_kv
    _, capacity, kv_length = keys_of(sequences, b)
    positions = kv_length - seqlen_new + offs_n
    ok = (offs_n < seqlen_new) & (positions >= 0) & (positions < capacity)
    if VARIANT.ROTARY_DIM > 0:
        tile_k = load_rotated(k_new, offset_of(k_new, b, head, offs_n), ok, positions, rotation, VARIANT)
    else:
        tile_k = load_rows(k_new, b, head, offs_n, ok, VARIANT.BLOCK_D, VARIANT.HEAD_DIM)
    WIDTH_V: tl.constexpr = VARIANT.PART * VARIANT.PARTS
    tile_v = load_rows(v_new, b, head, offs_n, ok, WIDTH_V, VARIANT.HEAD_DIM_V)
    batch_or_page = b
    rows = positions
    if VARIANT.PAGED:
        batch_or_page, rows = page_and_slot(b, positions, ok, paging)
    store_rows(k, batch_or_page, head, rows, ok, tile_k, 0, VARIANT.BLOCK_D, VARIANT.HEAD_DIM)
    store_rows(v, batch_or_page, head, rows, ok, tile_v, 0, WIDTH_V, VARIANT.HEAD_DIM_V)
