"""The package xformers."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from ..cases import Case
from ..data import Data
from . import gpu_package
from .base import Rival


class Xformers(Rival):
    """xformers.ops.memory_efficient_attention."""

    name = "xformers"

    def why_not(self, case: Case, data: Data) -> str | None:
        """Needs CUDA, 16 bits, dense, as many key heads as query heads, no window."""
        unavailable = gpu_package.why_unavailable("xformers", case, data)
        if unavailable is not None:
            return unavailable
        if case.heads_q != case.heads_kv:
            return "xformers has no grouped heads in its 4-dimensional layout"
        masked_twice = case.causal and case.mask != "none"
        if case.window is not None or case.varlen or case.mask == "bool" or masked_twice:
            return "xformers is compared on full, causal and additive-mask dense cases only"
        return None

    def forward(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """One call on (batch, seqlen, heads, head_dim) views."""
        ops = import_module("xformers.ops")
        q, k, v = (x.transpose(1, 2) for x in (data.q, data.k, data.v))
        bias: Any = None
        if case.causal:
            masks = ops.fmha.attn_bias
            lower_right = case.causal_alignment == "bottom-right" and case.seqlen_q != case.seqlen_k
            bias = masks.LowerTriangularFromBottomRightMask() if lower_right else masks.LowerTriangularMask()
        elif data.bias is not None:
            bias = data.bias.expand(case.batch, case.heads_q, -1, -1)
        return lambda: ops.memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)
