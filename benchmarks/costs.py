"""The least that an attention call costs: floating point operations and bytes moved.

* One multiply-add counts as two operations.
* Only the matrix products count. The softmax is about 1 / head_dim of them.
* Only visible pairs (query, key) count, by causal rule, window and lengths. Computing hidden pairs earns no credit.
* A dense mask hides nothing here: a kernel must read it to know.
"""

from __future__ import annotations

from .cases import Case


def visible_keys(i: int, seqlen_q: int, seqlen_k: int, case: Case) -> range:
    """The keys that query i of one sequence sees by the causal rule and the window."""
    left, right = case.window_bounds
    position = i + (seqlen_k - seqlen_q if case.causal_alignment == "bottom-right" else 0)
    first = 0 if left is None else min(max(0, position - left), seqlen_k)
    last = seqlen_k - 1 if right is None else min(seqlen_k - 1, position + right)
    return range(first, max(first, last + 1))


def visible_pairs(case: Case) -> int:
    """Visible pairs (query, key) per query head, summed over the batch."""
    return sum(_pairs(seqlen_q, seqlen_k, case) for seqlen_q, seqlen_k in case.sequences)


def _pairs(seqlen_q: int, seqlen_k: int, case: Case) -> int:
    if case.window_bounds == (None, None):
        return seqlen_q * seqlen_k
    return sum(len(visible_keys(i, seqlen_q, seqlen_k, case)) for i in range(seqlen_q))


def keys_read(case: Case) -> int:
    """Keys that some query sees, per key/value head, summed over the batch."""
    total = 0
    for seqlen_q, seqlen_k in case.sequences:
        # Both ends of the visible range advance by one with i, so the union over i has no gap.
        ranges = [visible_keys(i, seqlen_q, seqlen_k, case) for i in (0, seqlen_q - 1)]
        total += max(0, ranges[1].stop - ranges[0].start)
    return total


def forward_flops(case: Case) -> int:
    """q k^T and probs v: 2 * pairs * heads_q * (head_dim + head_dim_v)."""
    return 2 * visible_pairs(case) * case.heads_q * (case.head_dim + case.head_dim_v)


def backward_flops(case: Case) -> int:
    """Five products: q k^T again, dprobs = dout v^T, dv = probs^T dout, dq = dscores k and dk = dscores^T q.

    2 * pairs * heads_q * (3 * head_dim + 2 * head_dim_v): 2.5 times the forward where head_dim_v = head_dim.
    """
    return 2 * visible_pairs(case) * case.heads_q * (3 * case.head_dim + 2 * case.head_dim_v)


def flops(case: Case) -> int:
    """Operations of one call in the case's mode."""
    return forward_flops(case) + (backward_flops(case) if case.train else 0)


def forward_bytes(case: Case) -> int:
    """q, visible k and v and the mask are read once, out is written once. Training also writes the lse."""
    sizes = _tensor_bytes(case)
    total = sizes["q"] + sizes["k"] + sizes["v"] + sizes["mask"] + sizes["out"]
    return total + (sizes["lse"] if case.train else 0)


def backward_bytes(case: Case) -> int:
    """q, k, v, out, dout, lse and the mask are read once, dq, dk and dv are written once."""
    sizes = _tensor_bytes(case)
    read = sizes["q"] + sizes["k"] + sizes["v"] + 2 * sizes["out"] + sizes["lse"] + sizes["mask"]
    return read + sizes["q"] + sizes["k"] + sizes["v"]


def bytes_moved(case: Case) -> int:
    """Bytes that one call moves in the case's mode, if each tensor crosses the memory bus once per pass."""
    return forward_bytes(case) + (backward_bytes(case) if case.train else 0)


def _tensor_bytes(case: Case) -> dict[str, int]:
    itemsize = case.torch_dtype.itemsize
    queries = sum(seqlen_q for seqlen_q, _ in case.sequences)
    keys = keys_read(case)
    mask_itemsize = {"none": 0, "bool": 1, "additive": itemsize}[case.mask]
    return {
        "q": queries * case.heads_q * case.head_dim * itemsize,
        "k": keys * case.heads_kv * case.head_dim * itemsize,
        "v": keys * case.heads_kv * case.head_dim_v * itemsize,
        "out": queries * case.heads_q * case.head_dim_v * itemsize,
        "lse": queries * case.heads_q * (8 if case.dtype == "float64" else 4),
        "mask": case.seqlen_q * case.seqlen_k * mask_itemsize,
    }
