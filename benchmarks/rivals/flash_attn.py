"""The package flash-attn."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from ..cases import Case
from ..data import Data
from . import gpu_package
from .base import Rival


class FlashAttn(Rival):
    """The package flash-attn (FlashAttention-2): flash_attn_func and flash_attn_varlen_func."""

    name = "flash-attn"

    def why_not(self, case: Case, data: Data) -> str | None:
        """Needs CUDA, 16 bits, bottom-right alignment, no dense mask, equal head dims of at most 256."""
        unavailable = gpu_package.why_unavailable("flash_attn", case, data)
        if unavailable is not None:
            return unavailable
        if case.mask != "none":
            return "flash-attn supports no dense mask"
        if case.head_dim != case.head_dim_v or case.head_dim > 256:
            return "flash-attn needs head_dim_v = head_dim <= 256"
        bounded = case.window_bounds != (None, None)
        if bounded and case.causal_alignment == "top-left" and any(sq != sk for sq, sk in case.sequences):
            return "flash-attn aligns causal and window bottom-right only"
        return None

    def forward(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """One call on (batch, seqlen, heads, head_dim) views, or on the packed tensors."""
        package = import_module("flash_attn")
        left, right = (-1 if side is None else side for side in case.window_bounds)
        arguments = {"causal": case.causal, "window_size": (left, right)}
        if case.varlen:
            lengths = (data.cu_seqlens_q, data.cu_seqlens_k, case.seqlen_q, case.seqlen_k)
            return lambda: package.flash_attn_varlen_func(data.q, data.k, data.v, *lengths, **arguments)
        q, k, v = (x.transpose(1, 2) for x in (data.q, data.k, data.v))
        return lambda: package.flash_attn_func(q, k, v, **arguments).transpose(1, 2)
