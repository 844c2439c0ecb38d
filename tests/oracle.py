"""What fastattn promises, evaluated in float64 NumPy, one query at a time.

Written from the contract alone and sharing no code with the package: loops over sequences, heads and queries,
an explicit list of the keys that each query sees, and the derivative formulas of softmax written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
GRADIENTS = ("q", "k", "v", "bias", "sinks")


@dataclass
class Result:
    """out and lse; with cotangents also the gradients.

    terms holds, per gradient, the largest single product that was summed into it: the unit in which a gradient that
    cancels to zero is to be judged. weights are the probabilities after dropout, (batch, heads_q, seqlen_q, seqlen_k).
    """

    out: Array
    lse: Array
    weights: Array | None = None
    grads: dict[str, Array] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------ dropout


def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Salmon et al. (SC 2011), in Python integers of any size."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return [c0, c1, c2, c3]


def philox_rows(seed: int, row: int, seqlen_q: int, seqlen_k: int, first_query: int = 0) -> Array:
    """The 32-bit word of each (first_query + i, j) of one head: uint64 (seqlen_q, seqlen_k); row = b * heads_q + h."""
    low = np.uint64(0xFFFFFFFF)
    blocks = (seqlen_k + 3) // 4
    shape = (seqlen_q, blocks)
    c = [
        np.broadcast_to(np.arange(blocks, dtype=np.uint64), shape),
        np.broadcast_to((np.arange(seqlen_q)[:, None] + first_query).astype(np.uint64) & low, shape),
        np.full(shape, row, dtype=np.uint64),
        np.zeros(shape, dtype=np.uint64),
    ]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        product0, product1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (product1 >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]),
            product1 & low,
            (product0 >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]),
            product0 & low,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return np.stack(c, axis=-1).reshape(seqlen_q, 4 * blocks)[:, :seqlen_k]


def dropout_keep(seed: int, p: float, row: int, seqlen_q: int, seqlen_k: int, first_query: int = 0) -> Array:
    """Which entries of one head survive."""
    return philox_rows(seed, row, seqlen_q, seqlen_k, first_query) >= np.uint64(int(np.floor(p * 2.0**32)))


# --------------------------------------------------------------------------------------------------------- visibility


def key_range(i: int, offset: int, length: int, causal: bool, window: tuple[int | None, int | None] | None) -> range:
    """The keys that query i may see, masks aside."""
    left, right = window if window is not None else (None, None)
    if causal:
        right = 0 if right is None else min(0, right)
    first = 0 if left is None else max(0, i + offset - left)
    last = length - 1 if right is None else min(length - 1, i + offset + right)
    return range(first, last + 1)


# -------------------------------------------------------------------------------------------------------------- dense


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def dense(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    causal_alignment: str = "bottom-right",
    mask: Array | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    kv_lengths: Array | None = None,
    q_offset: Array | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    first_batch: int = 0,
    dout: Array | None = None,
    dlse: Array | None = None,
) -> Result:
    """Attention of q (B, Hq, Sq, D) over k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv), all float64."""
    batch, heads_q, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k, head_dim_v = k.shape[1], k.shape[2], v.shape[3]
    full = (batch, heads_q, seqlen_q, seqlen_k)
    if scale is None:
        scale = 1.0 / np.sqrt(head_dim) if head_dim else 1.0
    all_mask = None if mask is None else np.broadcast_to(mask, full)
    all_bias = None if bias is None else np.broadcast_to(bias, full)
    out = np.zeros((batch, heads_q, seqlen_q, head_dim_v))
    lse = np.full((batch, heads_q, seqlen_q), -np.inf)
    weights = np.zeros(full)
    grads = {"q": np.zeros_like(q), "k": np.zeros_like(k), "v": np.zeros_like(v), "bias": np.zeros(full)}
    grads["sinks"] = np.zeros(heads_q)
    terms = dict.fromkeys(GRADIENTS, 0.0)

    for b in range(batch):
        length = seqlen_k if kv_lengths is None else int(kv_lengths[b])
        offset = length - seqlen_q if causal_alignment == "bottom-right" else 0
        offset = offset if q_offset is None else int(q_offset[b])
        for h in range(heads_q):
            g = h * heads_kv // heads_q
            factor = np.ones((seqlen_q, seqlen_k))
            if dropout_p > 0.0:
                first_query = 0 if q_offset is None else offset
                keep = dropout_keep(seed, dropout_p, (first_batch + b) * heads_q + h, seqlen_q, seqlen_k, first_query)
                factor = keep / (1.0 - dropout_p)
            for i in range(seqlen_q):
                keys = np.array(key_range(i, offset, length, causal, window), dtype=np.int64)
                if all_mask is not None:
                    keys = keys[all_mask[b, h, i, keys]]
                scores = scale * (k[b, g, keys] @ q[b, h, i])
                slope = np.ones_like(scores)
                if softcap is not None:
                    slope = 1.0 - np.tanh(scores / softcap) ** 2
                    scores = softcap * np.tanh(scores / softcap)
                if alibi_slopes is not None:
                    m = alibi_slopes[h] if alibi_slopes.ndim == 1 else alibi_slopes[b, h]
                    scores = scores - m * np.abs(i + offset - keys)
                if all_bias is not None:
                    scores = scores + all_bias[b, h, i, keys]
                dlse_i = 0.0 if dlse is None else dlse[b, h, i]
                if np.all(scores == -np.inf):  # no key, or none that counts: the sink is all there is
                    if sinks is not None:
                        lse[b, h, i] = sinks[h]
                        grads["sinks"][h] += dlse_i
                        terms["sinks"] = max(terms["sinks"], abs(dlse_i))
                    continue
                top = np.max(scores) if sinks is None else max(np.max(scores), sinks[h])
                weight = np.exp(scores - top)
                sink = 0.0 if sinks is None else np.exp(sinks[h] - top)
                total = np.sum(weight) + sink
                probs, sink_prob = weight / total, sink / total
                lse[b, h, i] = top + np.log(total)
                kept = factor[i, keys]
                weights[b, h, i, keys] = probs * kept
                out[b, h, i] = (probs * kept) @ v[b, g, keys]
                if dout is None:
                    continue

                dprobs = (v[b, g, keys] @ dout[b, h, i]) * kept
                dscores = probs * (dprobs - probs @ dprobs + dlse_i)
                raw = scale * slope * dscores
                grads["q"][b, h, i] = raw @ k[b, g, keys]
                grads["k"][b, g, keys] += np.outer(raw, q[b, h, i])
                grads["v"][b, g, keys] += np.outer(probs * kept, dout[b, h, i])
                grads["bias"][b, h, i, keys] = dscores
                grads["sinks"][h] -= sink_prob * (probs @ dprobs - dlse_i)

                term = probs * (np.abs(dprobs) + probs @ np.abs(dprobs) + abs(dlse_i))
                raw_term = np.max(np.abs(scale * slope) * term)
                largest_k = np.max(np.abs(k[b, g, keys]), initial=0.0)
                largest_q = np.max(np.abs(q[b, h, i]), initial=0.0)
                terms["q"] = max(terms["q"], raw_term * largest_k)
                terms["k"] = max(terms["k"], raw_term * largest_q)
                terms["bias"] = max(terms["bias"], np.max(term))
                terms["sinks"] = max(terms["sinks"], sink_prob * (probs @ np.abs(dprobs) + abs(dlse_i)))

    if bias is not None:
        grads["bias"] = sum_to(grads["bias"], bias.shape)
    return Result(out, lse, weights, grads, terms)


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of broadcasting `shape` to x's shape."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    stretched = tuple(d for d, size in enumerate(shape) if size == 1 and x.shape[d] != 1)
    return x.sum(axis=stretched, keepdims=True) if stretched else x


# ------------------------------------------------------------------------------------------------------------- varlen


def varlen(
    q: Array, k: Array, v: Array, cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int], **options: Any
) -> Result:
    """Attention of q (total_q, Hq, D), k (total_k, Hkv, D), v (total_k, Hkv, Dv): each sequence by itself."""
    dout, dlse = options.pop("dout", None), options.pop("dlse", None)
    result = Result(np.zeros((*q.shape[:2], v.shape[2])), np.full((q.shape[1], q.shape[0]), -np.inf))
    result.grads = {n: np.zeros_like(x) for n, x in (("q", q), ("k", k), ("v", v))}
    result.grads |= {n: np.zeros_like(options[n]) for n in ("bias", "sinks") if options.get(n) is not None}
    result.terms = dict.fromkeys(GRADIENTS, 0.0)
    for b in range(len(cu_seqlens_q) - 1):
        rows = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1])
        cols = slice(cu_seqlens_k[b], cu_seqlens_k[b + 1])
        cut = sequence_cut(b, rows.stop - rows.start, cols.stop - cols.start)
        own = {name: cut(x) if name in ("mask", "bias") else x for name, x in options.items()}
        for name in ("kv_lengths", "q_offset"):
            if own.get(name) is not None:
                own[name] = own[name][b : b + 1]
        if own.get("alibi_slopes") is not None and own["alibi_slopes"].ndim == 2:
            own["alibi_slopes"] = own["alibi_slopes"][b]
        part = dense(
            as_one_sequence(q, rows),
            as_one_sequence(k, cols),
            as_one_sequence(v, cols),
            **own,
            first_batch=b,
            dout=None if dout is None else as_one_sequence(dout, rows),
            dlse=None if dlse is None else dlse[None, :, rows],
        )
        result.out[rows] = part.out[0].swapaxes(0, 1)
        result.lse[:, rows] = part.lse[0]
        for name, where in (("q", rows), ("k", cols), ("v", cols)):
            result.grads[name][where] = part.grads[name][0].swapaxes(0, 1)
        if "bias" in result.grads:
            view = cut(result.grads["bias"])
            view += part.grads["bias"]
        if "sinks" in result.grads:
            result.grads["sinks"] += part.grads["sinks"]
        result.terms = {name: max(value, part.terms[name]) for name, value in result.terms.items()}
    return result


def as_one_sequence(x: Any, tokens: slice) -> Any:
    """Tokens of (total, heads, dim) as a batch of one, (1, heads, seqlen, dim); for arrays and tensors."""
    return x[tokens].swapaxes(0, 1)[None]


def sequence_cut(b: int, seqlen_q: int, seqlen_k: int) -> Callable[[Any], Any]:
    """Takes sequence b's part out of a mask or bias that broadcasts to (batch, heads, longest, longest); a view."""

    def cut(x: Any) -> Any:
        if x is None:
            return None
        x = x[(None,) * (4 - x.ndim)]
        for axis, part in ((0, slice(b, b + 1)), (2, slice(seqlen_q)), (3, slice(seqlen_k))):
            if x.shape[axis] > 1:
                x = x[(slice(None),) * axis + (part,)]
        return x

    return cut


# -------------------------------------------------------------------------------------------------- cache and rotary


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool, positions: Array) -> Array:
    """Rotates x (B, H, S, D) as complex numbers; positions (B, S)."""
    half = cos.shape[1]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    turn = (cos + 1j * sin)[positions][:, None]
    turned = (x[..., first] + 1j * x[..., second]) * turn
    result = x.copy()
    result[..., first], result[..., second] = turned.real, turned.imag
    return result


def cached(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    *,
    cache_lengths: Sequence[int],
    k_new: Array | None = None,
    v_new: Array | None = None,
    block_table: Array | None = None,
    rotary: tuple[Array, Array, bool] | None = None,
    **options: Any,
) -> tuple[Result, Array, Array]:
    """(result, k_cache, v_cache): attention over a cache, and the caches after the new keys were written."""
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    seqlen_new = 0 if k_new is None else k_new.shape[2]
    total = np.asarray(cache_lengths) + seqlen_new
    if rotary is not None:
        bottom_right = options.get("causal_alignment", "bottom-right") == "bottom-right"
        offset = total - q.shape[2] if bottom_right else np.zeros_like(total)
        offset = options.get("q_offset", offset)
        # A query before the first position sees nothing, so its angle does not matter.
        q = rotate(q, *rotary, np.maximum(offset[:, None] + np.arange(q.shape[2]), 0))
        if k_new is not None:
            k_new = rotate(k_new, *rotary, np.asarray(cache_lengths)[:, None] + np.arange(seqlen_new))

    def place(b: int, position: int) -> tuple[int, int]:
        if block_table is None:
            return b, position
        page_size = k_cache.shape[2]
        return block_table[b, position // page_size], position % page_size

    for b, length in enumerate(cache_lengths):
        for t in range(seqlen_new):
            block, slot = place(b, length + t)
            k_cache[block, :, slot], v_cache[block, :, slot] = k_new[b, :, t], v_new[b, :, t]
    capacity = k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    k = np.zeros((q.shape[0], k_cache.shape[1], capacity, k_cache.shape[3]))
    v = np.zeros((q.shape[0], k_cache.shape[1], capacity, v_cache.shape[3]))
    for b in range(q.shape[0]):
        for position in range(total[b]):
            block, slot = place(b, position)
            k[b, :, position], v[b, :, position] = k_cache[block, :, slot], v_cache[block, :, slot]
    return dense(q, k, v, kv_lengths=total, **options), k_cache, v_cache
