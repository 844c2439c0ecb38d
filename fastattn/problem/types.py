"""The types of a call: its tensors, its options, their keyword arguments, and the `Problem` made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from typing_extensions import Required  # a requirement of torch itself

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ALIGNMENTS = ("bottom-right", "top-left")


class Inputs(NamedTuple):
    """The tensors of a call, those of arguments.py; their shapes are in `fastattn.attention` and its siblings.

    For a call with a cache, k and v are the caches and kv_lengths the keys in them *before* the call.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    kv_lengths: Tensor | None = None
    q_offset: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seed: Tensor | None = None
    k_new: Tensor | None = None
    v_new: Tensor | None = None
    block_table: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The tensors that have gradients, in the order of DIFFERENTIABLE."""
        return self.q, self.k, self.v, self.bias, self.sinks


class Options(NamedTuple):
    """Everything of a call that is not a tensor, as the user gave it; that of arguments.py."""

    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    causal_alignment: str = "bottom-right"
    softcap: float | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    rotary_interleaved: bool = False


class _SharedOptions(TypedDict, total=False):
    causal: bool
    window: tuple[int | None, int | None] | None
    causal_alignment: str
    q_offset: int | Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    scale: float | None


class AttentionOptions(_SharedOptions, total=False):
    """Keyword arguments of `fastattn.attention` and `attention_varlen`, except return_lse and backend."""

    kv_lengths: Tensor | None
    dropout_p: float
    seed: int | Tensor | None


class CacheOptions(_SharedOptions, total=False):
    """Keyword arguments of `fastattn.attention_with_kv_cache`, except return_lse and backend."""

    cache_lengths: Required[Tensor]
    k_new: Tensor | None
    v_new: Tensor | None
    block_table: Tensor | None
    rotary: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, bool] | None


@dataclass(frozen=True)
class Problem:
    """What is to be computed, without the data: hashable, printable, the input of every chooser.

    A varlen call has `batch` sequences; its seqlen_q and seqlen_k are the totals over all of them.
    A call with a cache has seqlen_k = the cache's capacity per sequence.
    """

    kind: str  # "dense", "varlen" or "cache"
    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device
    window_left: int | None  # keys to the left of the diagonal that a query sees; None = all
    window_right: int | None  # likewise to the right; 0 for causal
    bottom_right: bool  # without q_offset: the last query stands at the last key (else: the first at the first)
    softcap: float | None
    scale: float
    dropout_p: float
    seqlen_new: int  # keys appended to the cache by this call
    page_size: int  # 0 = contiguous cache
    rotary_dim: int  # 0 = no rotary embedding
    rotary_interleaved: bool
    features: frozenset[str]  # what the call uses beyond plain attention: "mask", "bias", "window", ...

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads_q // self.heads_kv if self.heads_kv else 1

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of scores, sums, lse and all intermediate results."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def dropout_threshold(self) -> int:
        """A probability is kept iff its 32-bit Philox word is at least this: floor(p * 2^32)."""
        return int(self.dropout_p * 2**32)


class Meta(NamedTuple):
    """What `describe` needs to know of a tensor; hashable, so that a description is made once per signature."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device
