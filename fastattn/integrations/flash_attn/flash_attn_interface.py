"""flash_attn.flash_attn_interface: the attention functions of flash-attn 2.8.

Query i stands at key i + seqlen_k - seqlen_q (bottom-right), per sequence. What their arguments have in common:

    dropout_p          probability of dropping; the mask is fastattn's, drawn from torch's default CPU generator
    softmax_scale      default 1 / sqrt(headdim)
    causal             a query sees no key behind its own
    window_size        (left, right): how many keys to either side of its own a query sees; -1 = all. Any pair of
                       integers: a tuple, a list, a tensor
    softcap            scores become softcap * tanh(scores / softcap); 0 = off
    alibi_slopes       (nheads,) or (batch_size, nheads): adds -slope * |i + seqlen_k - seqlen_q - j| to the scores
    deterministic      results are the same from run to run anyway
    return_attn_probs  return (out, softmax_lse, S_dmask). softmax_lse is float32 (float64 for float64), +inf for a
                       query that sees no key (fastattn.merge_states knows it by its out of 0), and differentiable;
                       with ALiBi it is that of the formula above.
                       S_dmask, the matrix for flash-attn's own tests, is an empty tensor, as flash-attn's is without
                       dropout, and refused with

All but flash_attn_with_kvcache are differentiable in q, k and v. A query that sees no key gives 0. They raise TypeError
or ValueError that names the argument, what came and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...functional import attention, attention_varlen
from .arguments import (
    check_dense,
    check_packed,
    check_rank,
    check_tensors,
    check_values,
    check_varlen,
    flash_lse,
    number,
    options,
)
from .kv_cache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Window = Sequence[int] | Tensor


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (batch_size, seqlen_q, nheads, headdim) over k and v (batch_size, seqlen_k, nheads_k, headdim).

    nheads is a multiple of nheads_k; the other arguments are explained above, in the module.
    Returns out (batch_size, seqlen_q, nheads, headdim), or (out, softmax_lse (batch_size, nheads, seqlen_q), S_dmask).
    """
    check_dense(q, k, v)
    _check_probs(return_attn_probs, dropout_p)
    given = options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not return_attn_probs:
        return attention(q, k, v, **given, dropout_p=number("dropout_p", dropout_p)).transpose(1, 2)
    out, lse = attention(q, k, v, **given, return_lse=True)
    return out.transpose(1, 2), flash_lse(lse), q.new_empty(0)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with k and v in one tensor, kv (batch_size, seqlen_k, 2, nheads_k, headdim)."""
    check_packed("kv", kv, "(batch_size, seqlen_k, 2, nheads_k, headdim)", 2, 2)
    rest: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, *rest)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with q, k and v in one tensor, qkv (batch_size, seqlen, 3, nheads, headdim)."""
    check_packed("qkv", qkv, "(batch_size, seqlen, 3, nheads, headdim)", 2, 3)
    rest: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, *rest)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """`flash_attn_func` over sequences of different lengths, packed one behind the other.

        q             (total_q, nheads, headdim)
        k, v          (total_k, nheads_k, headdim); with block_table (num_blocks, page_block_size, nheads_k, headdim)
        cu_seqlens_*  (batch_size + 1,), int32: sequence b is the tokens cu_seqlens[b] to cu_seqlens[b + 1]
        max_seqlen_*  not needed here
        block_table   (batch_size, max_num_blocks), int32: the pages of each sequence's keys; a GPU is waited for

    Returns out (total_q, nheads, headdim), or (out, softmax_lse (nheads, total_q), S_dmask).
    """
    if block_table is not None:
        k, v = (_from_pages(name, x, block_table, cu_seqlens_k) for name, x in (("k", k), ("v", v)))
    check_varlen(q, k, v)
    _check_probs(return_attn_probs, dropout_p)
    given = options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    given["dropout_p"] = number("dropout_p", dropout_p)
    out, lse = attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **given, return_lse=True)
    return (out, flash_lse(lse), q.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with k and v in one tensor, kv (total_k, 2, nheads_k, headdim)."""
    check_packed("kv", kv, "(total_k, 2, nheads_k, headdim)", 1, 2)
    lengths: Any = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rest: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, *lengths, *rest)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with q, k and v in one tensor, qkv (total, 3, nheads, headdim)."""
    check_packed("qkv", qkv, "(total, 3, nheads, headdim)", 1, 3)
    lengths: Any = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    rest: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, *lengths, *rest)


def _check_probs(return_attn_probs: bool, dropout_p: float) -> None:
    if return_attn_probs and dropout_p:
        raise ValueError(
            f"return_attn_probs must be False with dropout, got dropout_p = {dropout_p}: fastattn makes no S_dmask, "
            "the matrix for flash-attn's own tests; softmax_lse is that of dropout_p = 0"
        )


def _from_pages(name: str, x: Tensor, block_table: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """x (num_blocks, page_block_size, nheads_k, headdim) as packed tokens (total_k, nheads_k, headdim)."""
    check_tensors(**{name: x, "block_table": block_table, "cu_seqlens_k": cu_seqlens_k})
    check_rank(name, x, "(num_blocks, page_block_size, nheads_k, headdim)")
    check_rank("block_table", block_table, "(batch_size, max_num_blocks)")
    starts = cu_seqlens_k[:-1].long()
    lengths = cu_seqlens_k[1:].long() - starts
    if len(block_table) != len(lengths):
        raise ValueError(f"block_table must have {len(lengths)} rows, one per sequence, got {tuple(block_table.shape)}")
    num_blocks, page_size = x.shape[:2]
    longest = int(lengths.amax()) if len(lengths) else 0
    if longest > block_table.shape[1] * page_size:
        raise ValueError(
            f"block_table must hold the pages of {longest} keys, got {block_table.shape[1]} of {page_size}"
        )
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
    position = torch.arange(len(sequence), device=x.device) - starts[sequence]
    page = block_table[sequence, position // page_size].long()
    check_values("block_table", page, num_blocks - 1, "the last page")
    return x[page, position % page_size]
