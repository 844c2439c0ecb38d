"""Which tile a program works on, where its sequence lies, and which blocks it visits.

A full block is one of which every query sees every key. The others are masked blocks.
"""

import triton
import triton.language as tl

# ------------------------------------------------------------------------------------------------------------ sequences


@triton.jit
def _clamp(x, limit):
    """Index tensors on a GPU are not checked; a wrong one must not lead out of memory."""
    return tl.minimum(tl.maximum(x, 0), limit)


@triton.jit
def extent(cu_seqlens, b, batch, total):
    """(start, length) of a varlen sequence; sequence number `batch` holds the tokens that belong to none."""
    start = _clamp(tl.load(cu_seqlens + b), total)
    end = _clamp(tl.load(cu_seqlens + b + 1, mask=b < batch, other=total), total)
    return start, tl.maximum(end - start, 0)


@triton.jit
def queries_of(sequences, b):
    """(start, length) of sequence b's queries."""
    start = b * 0
    length = start + sequences.seqlen_q
    if sequences.cu_seqlens_q is not None:
        start, length = extent(sequences.cu_seqlens_q, b, sequences.batch, sequences.seqlen_q)
    return start, length


@triton.jit
def keys_of(sequences, b):
    """(start, length in memory, keys that exist) of sequence b's keys."""
    start = b * 0
    length = start + sequences.seqlen_k
    if sequences.cu_seqlens_k is not None:
        start, length = extent(sequences.cu_seqlens_k, b, sequences.batch, sequences.seqlen_k)
    kv_length = length
    if sequences.kv_lengths is not None:
        given = tl.load(sequences.kv_lengths + b, mask=b < sequences.batch, other=0)
        kv_length = _clamp(given + sequences.seqlen_new, length)
    if sequences.cu_seqlens_k is not None:
        kv_length = tl.where(b < sequences.batch, kv_length, 0)
    return start, length, kv_length


# ------------------------------------------------------------------------------------------------------------- programs


@triton.jit
def varlen_tile(tile, cu_seqlens, batch, BLOCK: tl.constexpr):
    """(sequence, tile within it) of a varlen call.

    Sequence b owns the tiles from cu_seqlens[b] // BLOCK + b on, which are at least as many as it needs.
    So a program finds its sequence by bisection, and the host need not know the lengths.
    """
    low = tile * 0
    high = low + batch
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low, tile - (tl.load(cu_seqlens + low) // BLOCK + low)


@triton.jit
def rows_per_query(heads, VARIANT: tl.constexpr):
    """Rows of a tile that one query takes."""
    return heads.group if VARIANT.PACK_GQA else heads.group * 0 + 1


@triton.jit
def program_tile(heads, sequences, splits, VARIANT: tl.constexpr):
    """(tile of its sequence, split, head, sequence) of this program; the grid is flat, in this order."""
    BLOCK_M: tl.constexpr = VARIANT.BLOCK_M
    tiles = (sequences.seqlen_q * rows_per_query(heads, VARIANT) + BLOCK_M - 1) // BLOCK_M
    if sequences.cu_seqlens_q is not None:
        tiles = sequences.seqlen_q // BLOCK_M + sequences.batch + 1
    pid = tl.program_id(0)
    m_index = tiles - 1 - pid % tiles  # the last queries see most keys when causal, so they go first
    pid = pid // tiles
    split = pid * 0
    if splits is not None:
        split = pid % splits
        pid = pid // splits
    head_count = heads.heads_kv if VARIANT.PACK_GQA else heads.heads_q
    head = pid % head_count
    b = pid // head_count
    if sequences.cu_seqlens_q is not None:
        b, m_index = varlen_tile(m_index, sequences.cu_seqlens_q, sequences.batch, BLOCK_M)
    return m_index, split, head, b


# --------------------------------------------------------------------------------------------------------------- blocks


@triton.jit
def q_offset_of(sequences, b):
    """Where query 0 stands if the call says so, else 0: what dropout adds to the numbers of queries."""
    offset = b * 0
    if sequences.q_offset is not None:
        # Within 2^28: sums with positions and sides of windows stay within 32 bits.
        given = tl.load(sequences.q_offset + b, mask=b < sequences.batch, other=0)
        offset = tl.minimum(tl.maximum(given, -(2**28)), 2**28)
    return offset


@triton.jit
def diagonal_offset(window, sequences, b, seqlen_q, kv_length):
    """The key at which query 0 stands."""
    offset = (kv_length - seqlen_q) * window.bottom_right
    if sequences.q_offset is not None:
        offset = q_offset_of(sequences, b)
    return offset


@triton.jit
def key_blocks(window, first_m, last_m, offset, kv_length, BLOCK_N: tl.constexpr):
    """(n_begin, n_end, full_begin, full_end) for a tile of queries, first_m to last_m.

    Some of them see the keys from n_begin up to n_end, without it. The blocks from full_begin to full_end are full.
    """
    n_end = tl.maximum(tl.minimum(last_m + offset + window.right + 1, kv_length), 0)
    n_begin = n_end * 0
    full_begin = n_begin
    if window.left is not None:
        n_begin = tl.maximum(first_m + offset - window.left, 0)
        n_end = tl.where(n_end > n_begin, n_end, 0)
        n_begin = tl.minimum(n_begin, n_end)  # an empty range is (0, 0), which rounds to no block
        full_begin = tl.maximum(last_m + offset - window.left, 0)
        full_begin = (full_begin + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    begin = n_begin // BLOCK_N * BLOCK_N
    full_end = tl.minimum(first_m + offset + window.right + 1, kv_length)
    full_end = tl.maximum(full_end // BLOCK_N * BLOCK_N, begin)
    return n_begin, n_end, tl.minimum(tl.maximum(full_begin, begin), full_end), full_end


@triton.jit
def query_blocks(window, first_n, last_n, offset, seqlen_q, kv_length, BLOCK_M: tl.constexpr):
    """(m_begin, m_end, full_begin, full_end) for a tile of keys, first_n to last_n.

    The queries from m_begin up to m_end, without it, see some of them. The blocks from full_begin to full_end are full.
    """
    last_key = tl.minimum(last_n, kv_length - 1)
    m_begin = tl.maximum(first_n - window.right - offset, 0)
    full_begin = tl.maximum(last_key - window.right - offset, 0)
    m_end = m_begin * 0 + seqlen_q
    full_end = m_end
    if window.left is not None:
        m_end = tl.minimum(last_key + window.left - offset + 1, seqlen_q)
        full_end = tl.minimum(first_n + window.left - offset + 1, seqlen_q)
    m_end = tl.where((first_n < kv_length) & (m_end > m_begin), m_end, 0)
    m_begin = tl.minimum(m_begin, m_end)  # an empty range is (0, 0), which rounds to no block
    begin = m_begin // BLOCK_M * BLOCK_M
    full_begin = (full_begin + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    full_end = tl.maximum(tl.minimum(full_end, m_end) // BLOCK_M * BLOCK_M, begin)
    return m_begin, m_end, tl.minimum(tl.maximum(full_begin, begin), full_end), full_end


@triton.jit
def masked_block(step, begin, full_begin, full_end, BLOCK: tl.constexpr):
    """Where the masked block number `step` begins: first those before full_begin, then those from full_end on."""
    position = begin + step * BLOCK
    return tl.where(position < full_begin, position, position + (full_end - full_begin))
