"""The public functions. All of them describe their call, and hand it to `fastattn.autograd`."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack  # a requirement of torch itself

from . import autograd, sdpa
from .autograd import fast_path
from .autograd.autocast import autocast
from .backends import dispatch
from .backends.dispatch import Report, available_backends
from .merge import merge_states
from .philox import seed_tensor
from .problem import (
    AttentionOptions,
    CacheOptions,
    Inputs,
    Options,
    check_keywords,
    check_values,
    describe,
    split_window,
    with_offset,
)
from .rotary import Rotary, apply_rotary

__all__ = [
    "Report",
    "Rotary",
    "apply_rotary",
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "available_backends",
    "explain",
    "merge_states",
    "scaled_dot_product_attention",
]

Window = tuple[int | None, int | None] | None


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    backend: str | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    backend: str | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool,
    backend: str | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    causal_alignment: str = "bottom-right",
    q_offset: int | Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Exact attention, softmax(scale * q k^T) v, with every option combinable with every other.

    Tensors (dtype float32, float64, bfloat16 or float16, any strides):

        q              (batch, heads_q, seqlen_q, head_dim)
        k              (batch, heads_kv, seqlen_k, head_dim)     heads_q a multiple of heads_kv (GQA, MQA)
        v              (batch, heads_kv, seqlen_k, head_dim_v)   head_dim_v may differ from head_dim
        mask           bool, broadcastable to (batch, heads_q, seqlen_q, seqlen_k); True = attend
        bias           float, broadcastable likewise; added to the scores; differentiable
        alibi_slopes   (heads_q,) or (batch, heads_q), float: adds -slope * |i + offset - j| to the scores
        sinks          (heads_q,), float: one more logit per head in the softmax's denominator; differentiable
        kv_lengths     (batch,), int32: keys at or past it do not exist and are never read

    Options:

        scale             default 1 / sqrt(head_dim)
        softcap           scores become softcap * tanh(scores / softcap), before ALiBi and bias are added
        causal            query i sees key j only if j <= i + offset
        window            (left, right), None = open: query i sees i + offset - left <= j <= i + offset + right
        causal_alignment  "bottom-right" (default): offset = kv_length - seqlen_q, the last query stands at the last
                          key; "top-left": offset = 0, the first query stands at the first key
        q_offset          int or (batch,), int32, from -2^28 to 2^28: the position of the first query among the keys,
                          as in a chunk of a longer sequence. offset = q_offset, whatever the alignment, and dropout
                          counts queries from it: chunks give what the whole gives
        dropout_p         probability, in [0, 1), of dropping each entry of the softmax; survivors grow by 1 / (1 - p)
        seed              int in [0, 2^63) or int64 tensor without dimensions: fixes the dropout mask (Philox4x32-10,
                          the same on all backends); None draws one from torch's default CPU generator
        return_lse        return (out, lse) instead of out
        backend           name of a backend that must do the call; None chooses, see `explain`

    With 3 queries and 5 keys (x = seen):

        causal, bottom-right   causal, top-left    window=(1, 0), bottom-right
            x x x . .              x . . . .            . x x . .
            x x x x .              x x . . .            . . x x .
            x x x x x              x x x . .            . . . x x

    Returns out (batch, heads_q, seqlen_q, head_dim_v) in q's dtype, its dimensions in memory in q's order; lse
    (batch, heads_q, seqlen_q), natural logarithm of the softmax's denominator, float32 (float64 for float64).
    A query that sees no key gives out = 0, lse = -inf and zero gradients; with a sink, lse is the sink, and the
    gradient of lse goes to it. In `attention_varlen`, rows behind the last sequence belong to none and have no sink.
    Differentiable in q, k, v, bias and sinks, through out and lse.

    Raises TypeError or ValueError that names the argument, what came and what was expected. The values inside index
    tensors are checked on the CPU alone: elsewhere a look at them would stall the device. NotImplementedError in
    forward mode (torch.func.jvp, jacfwd, hessian), for which there is no formula; a Hessian is jacrev(jacrev(f)).
    """
    extras = mask is not None or bias is not None or alibi_slopes is not None or sinks is not None
    placed = kv_lengths is not None or q_offset is not None
    dropped = type(dropout_p) is not float or dropout_p != 0.0  # None, False and the like are for the checks
    if not (extras or placed or seed is not None or dropped or return_lse):
        out = fast_path.attend(q, k, v, causal, window, causal_alignment, softcap, scale, backend)
        if out is not None:
            return out
    q, k, v = autocast(q, k, v)
    left, right = split_window(window)
    inputs = Inputs(q, k, v, mask, bias, alibi_slopes, sinks, kv_lengths, seed=_seed(seed, dropout_p))
    inputs = with_offset(inputs, q_offset)
    options = Options(causal, left, right, causal_alignment, softcap, scale, dropout_p)
    result = autograd.attend(inputs, options, backend)
    return result if return_lse else result[0]


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: Literal[True],
    backend: str | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: Literal[False] = False,
    backend: str | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: bool,
    backend: str | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    causal_alignment: str = "bottom-right",
    q_offset: int | Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`attention` over sequences of different lengths, packed one behind the other without padding.

        q              (total_q, heads_q, head_dim)
        k, v           (total_k, heads_kv, head_dim), (total_k, heads_kv, head_dim_v)
        cu_seqlens_q   (batch + 1,), int32: sequence b's queries are the rows cu_seqlens_q[b] to cu_seqlens_q[b + 1];
                       begins with 0, never decreases. Rows behind the last sequence see nothing and give 0
        cu_seqlens_k   (batch + 1,), int32: likewise for the keys
        kv_lengths     (batch,), int32: of sequence b only the first kv_lengths[b] keys exist
        mask, bias     (batch, heads_q, at least the longest query sequence, at least the longest key sequence), or 1
                       in any of these

    All other arguments as in `attention`; positions, lengths, alignment, q_offset and dropout count within each
    sequence.
    Returns out (total_q, heads_q, head_dim_v) or (out, lse), lse (heads_q, total_q).
    Raises TypeError or ValueError that names the argument, what came and what was expected.
    """
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu is None:
            raise TypeError(f"{name} must be an int32 tensor of shape (batch + 1,), got None")
    q, k, v = autocast(q, k, v)
    left, right = split_window(window)
    inputs = Inputs(
        *(q, k, v, mask, bias, alibi_slopes, sinks, kv_lengths),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seed=_seed(seed, dropout_p),
    )
    inputs = with_offset(inputs, q_offset)
    options = Options(causal, left, right, causal_alignment, softcap, scale, dropout_p)
    result = autograd.attend(inputs, options, backend)
    return result if return_lse else result[0]


@overload
def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: Literal[True],
    backend: str | None = None,
    **options: Unpack[CacheOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: Literal[False] = False,
    backend: str | None = None,
    **options: Unpack[CacheOptions],
) -> Tensor: ...
@overload
def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: bool,
    backend: str | None = None,
    **options: Unpack[CacheOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lengths: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary: Rotary | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, bool] | None = None,
    causal: bool = False,
    window: Window = None,
    causal_alignment: str = "bottom-right",
    q_offset: int | Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`attention` of a few new queries over cached keys and values, which it first extends in place. Inference only.

        q               (batch, heads_q, seqlen_q, head_dim)
        k_cache         (batch, heads_kv, capacity, head_dim), paged: (num_pages, heads_kv, page_size, head_dim)
        v_cache         likewise, with head_dim_v
        cache_lengths   (batch,), int32: keys in the cache before the call; the caller advances it afterwards
        k_new, v_new    (batch, heads_kv, seqlen_new, head_dim / head_dim_v): written behind them, in place
        block_table     (batch, max_pages), int32: position p of sequence b lies in page block_table[b, p // page_size]
                        at row p % page_size; capacity = max_pages * page_size
        rotary          fastattn.Rotary(cos, sin, interleaved=False): rotates q and k_new by their positions before use;
                        new key t stands at position cache_lengths[b] + t, query i at i + offset
        mask, bias      broadcastable to (batch, heads_q, seqlen_q, capacity)

    A query sees at most the cache_lengths + seqlen_new keys there are (the kv_lengths of `attention`); memory past them
    is never read. All other arguments as in `attention`. torch.autocast does not apply: q must have the cache's dtype.
    Returns out (batch, heads_q, seqlen_q, head_dim_v) or (out, lse), lse (batch, heads_q, seqlen_q).
    Raises TypeError or ValueError that names the argument, what came and what was expected, before anything is written;
    ValueError also if an input requires grad while gradients are recorded, NotImplementedError in forward mode.
    """
    if cache_lengths is None:
        raise TypeError("cache_lengths must be an int32 tensor of shape (batch,), got None")
    left, right = split_window(window)
    cos, sin, interleaved = _split_rotary(rotary)
    inputs = Inputs(
        *(q, k_cache, v_cache, mask, bias, alibi_slopes, sinks, cache_lengths),
        k_new=k_new,
        v_new=v_new,
        block_table=block_table,
        cos=cos,
        sin=sin,
    )
    inputs = with_offset(inputs, q_offset)
    options = Options(causal, left, right, causal_alignment, softcap, scale, 0.0, interleaved)
    result = autograd.attend_cache(inputs, options, backend)
    return result if return_lse else result[0]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: same arguments, same meaning.

        query       (..., heads_q, seqlen_q, head_dim), any number of leading dimensions
        key         (..., heads, seqlen_k, head_dim); leading dimensions broadcast as in torch
        value       (..., heads, seqlen_k, head_dim_v)
        attn_mask   bool (True = attend) or float (added to the scores), broadcastable to (..., seqlen_q, seqlen_k)
        is_causal   query i sees keys j <= i (upper-left, whatever the lengths); not together with attn_mask
        enable_gqa  heads_q may be a multiple of the heads of key and value

    Returns (..., heads_q, seqlen_q, head_dim_v). dropout_p is always applied: pass 0 in evaluation.
    The dropout mask is fastattn's own, not torch's. Rows that see nothing give 0.
    Raises TypeError or ValueError if an argument does not fit.
    """
    query, key, value = autocast(query, key, value)
    call = sdpa.translate(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return call.finish(attention(call.q, call.k, call.v, **call.options))


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **options: Unpack[AttentionOptions],
) -> Report:
    """Which backend `attention` would run this call on (`attention_varlen` with cu_seqlens), and why each other not.

    Takes the arguments of `attention`; computes nothing. print() the result.
    Raises what the call itself would raise.
    """
    check_keywords("explain", options)
    given: dict[str, Any] = dict(options)
    left, right = split_window(given.pop("window", None))
    seed = _seed(given.pop("seed", None), given.get("dropout_p", 0.0), draw=False)
    q_offset = given.pop("q_offset", None)
    tensors = {name: given.pop(name) for name in list(given) if name in Inputs._fields}
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k go together, got only one of them")
    q, k, v = autocast(q, k, v)
    inputs = Inputs(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seed=seed, **tensors)
    inputs = with_offset(inputs, q_offset)
    kind = "dense" if cu_seqlens_q is None else "varlen"
    problem = describe(kind, inputs, Options(**given, window_left=left, window_right=right), cached=False)
    check_values(problem, inputs)
    return dispatch.explain_choice(problem, inputs, backend)


# ---------------------------------------------------------------------------------------------------------- helpers


def _seed(seed: int | Tensor | None, dropout_p: float, *, draw: bool = True) -> Tensor | None:
    """The seed tensor of a call; None without dropout. A given seed is checked even then."""
    if seed is not None:
        given = seed_tensor(seed)
        return given if dropout_p else None
    return autograd.new_seed() if dropout_p and draw else None


def _split_rotary(rotary: Any) -> tuple[Tensor | None, Tensor | None, bool]:
    if rotary is None:
        return None, None, False
    if not isinstance(rotary, tuple) or len(rotary) not in (2, 3):
        raise TypeError(f"rotary must be fastattn.Rotary(cos, sin, interleaved), got {type(rotary).__name__}")
    cos, sin, interleaved = Rotary(*rotary)
    for name, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, Tensor):
            raise TypeError(f"rotary.{name} must be a torch.Tensor, got {type(table).__name__}")
    return cos, sin, bool(interleaved)
