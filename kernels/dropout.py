"""Which probabilities dropout keeps: a pure function of seed, batch, head, query and key."""

import triton
import triton.language as tl


@triton.jit
def keep_mask(dropout, i, row, n, BLOCK_N: tl.constexpr):
    """Which probabilities of the queries i, a column, and the block of keys from n on are kept; keys are permuted.

    row: batch * heads_q + head. Source of the words: Salmon et al., see fastattn/philox.py.
    """
    fours = (n // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    zero = (i * 0 + fours * 0).to(tl.uint32)
    k0 = dropout.seed_low.to(tl.uint32, bitcast=True)
    k1 = dropout.seed_high.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = tl.philox_impl(
        zero + fours.to(tl.uint32),
        zero + (i + dropout.first_query).to(tl.uint32),
        zero + row.to(tl.uint32),
        zero,
        k0,
        k1,
    )
    # Column 16 a + 8 b + 2 t + e is key 16 a + 4 t + 2 b + e: word 2 b + e of four number 4 a + t.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, (i.shape[0], BLOCK_N // 16, 4, 2, 2))
    words = tl.reshape(tl.permute(words, (0, 1, 3, 2, 4)), (i.shape[0], BLOCK_N))
    return words >= dropout.threshold.to(tl.uint32, bitcast=True)
