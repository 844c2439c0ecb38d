"""Which queries a program works on, which keys they see, and in which blocks all of them see all."""

import triton
import triton.language as tl


@triton.jit
def _bounded(x, limit):
    """Index tensors on a GPU are not checked; a wrong one must not lead out of memory."""
    return tl.minimum(tl.maximum(x, 0), limit)


@triton.jit
def extent(cu_seqlens, b, batch, total):
    """(start, length) of a varlen sequence; the one past the last holds the tokens that belong to none."""
    start = _bounded(tl.load(cu_seqlens + b), total)
    end = _bounded(tl.load(cu_seqlens + b + 1, mask=b < batch, other=total), total)
    return start, tl.maximum(end - start, 0)


@triton.jit
def tile_of(tile, cu_seqlens, batch, BLOCK: tl.constexpr):
    """(sequence, tile within it) of a varlen call.

    Sequence b owns the tiles from cu_seqlens[b] // BLOCK + b on, which are at least as many as it needs; so a program
    finds its sequence by bisection, and the host need not know the lengths.
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
        kv_length = _bounded(given + sequences.seqlen_new, length)
    if sequences.cu_seqlens_k is not None:
        kv_length = tl.where(b < sequences.batch, kv_length, 0)
    return start, length, kv_length


@triton.jit
def diagonal_offset(window, seqlen_q, kv_length):
    """The key at which query 0 stands."""
    return (kv_length - seqlen_q) * window.bottom_right


@triton.jit
def visible_keys(window, offs_m, offset, kv_length):
    """(first, last) key that each query sees; `first` is 0 if the window is open to the left."""
    last = tl.minimum(offs_m + offset + window.right, kv_length - 1)
    first = offs_m * 0
    if window.left is not None:
        first = tl.maximum(offs_m + offset - window.left, 0)
    return first, last


@triton.jit
def key_blocks(window, first_m, last_m, offset, kv_length, BLOCK_N: tl.constexpr):
    """(low, high, whole, cut) for the queries first_m to last_m, which are a tile.

    They see keys from low up to high, without it. The blocks between `whole` and `cut` need no mask.
    """
    high = tl.maximum(tl.minimum(last_m + offset + window.right + 1, kv_length), 0)
    low = high * 0
    whole = low
    if window.left is not None:
        low = tl.maximum(first_m + offset - window.left, 0)
        high = tl.where(high > low, high, 0)
        low = tl.minimum(low, high)  # an empty range is (0, 0), which rounds to no block
        whole = tl.maximum(last_m + offset - window.left, 0)
        whole = (whole + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    begin = low // BLOCK_N * BLOCK_N
    cut = tl.minimum(first_m + offset + window.right + 1, kv_length)
    cut = tl.maximum(cut // BLOCK_N * BLOCK_N, begin)
    return low, high, tl.minimum(tl.maximum(whole, begin), cut), cut


@triton.jit
def query_blocks(window, first_n, last_n, offset, seqlen_q, kv_length, BLOCK_M: tl.constexpr):
    """(low, high, whole, cut) for the keys first_n to last_n: the queries that see some, and those that see all."""
    last_key = tl.minimum(last_n, kv_length - 1)
    low = tl.maximum(first_n - window.right - offset, 0)
    whole = tl.maximum(last_key - window.right - offset, 0)
    high = low * 0 + seqlen_q
    cut = high
    if window.left is not None:
        high = tl.minimum(last_key + window.left - offset + 1, seqlen_q)
        cut = tl.minimum(first_n + window.left - offset + 1, seqlen_q)
    high = tl.where((first_n < kv_length) & (high > low), high, 0)
    low = tl.minimum(low, high)  # an empty range is (0, 0), which rounds to no block
    begin = low // BLOCK_M * BLOCK_M
    whole = (whole + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    cut = tl.maximum(tl.minimum(cut, high) // BLOCK_M * BLOCK_M, begin)
    return low, high, tl.minimum(tl.maximum(whole, begin), cut), cut


@triton.jit
def masked_block(step, begin, whole, cut, BLOCK: tl.constexpr):
    """Where the masked block number `step` begins: first those before `whole`, then those from `cut` on."""
    position = begin + step * BLOCK
    return tl.where(position < whole, position, position + (cut - whole))
