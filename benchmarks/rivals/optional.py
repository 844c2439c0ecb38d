"""Rivals that not every machine runs: FlexAttention needs a compiler, the others a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cases import Case
from ..data import Data, hidden_pairs
from .base import Rival, Sdpa


class Flex(Rival):
    """torch.compile of torch.nn.attention.flex_attention, with a block mask made beforehand.

    Varlen is one packed sequence whose mask lets a query see its own sequence only.
    """

    name = "flex"
    compiles = True

    def forward(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """One compiled flex_attention."""
        attention = _compiled_flex(case)
        q, k, v = (x.transpose(0, 1)[None] if case.varlen else x for x in (data.q, data.k, data.v))
        arguments: dict[str, Any] = {
            "block_mask": _block_mask(case, data),
            "enable_gqa": case.heads_q != case.heads_kv,
        }
        if data.bias is not None:
            arguments["score_mod"] = _add(data.bias)
        if case.varlen:
            return lambda: attention(q, k, v, **arguments)[0].transpose(0, 1)
        return lambda: attention(q, k, v, **arguments)


@lru_cache(maxsize=1)
def _compiled_flex(case: Case) -> Callable[..., Tensor]:
    """A fresh compilation for each case, shared by its copies of the tensors.

    Without the reset torch would reach its limit of recompilations after a few shapes and go on uncompiled.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return compiled


def _add(bias: Tensor) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[i, j]

    return score_mod


def _block_mask(case: Case, data: Data) -> Any:
    """The block mask of causal rule, window, mask and sequences' borders; None if everything is visible."""
    from torch.nn.attention.flex_attention import create_block_mask

    device = data.q.device
    if case.varlen:
        return create_block_mask(
            _packed_visibility(case, device), None, None, data.q.shape[0], data.k.shape[0], device=str(device)
        )
    hidden = hidden_pairs(case, case.seqlen_q, case.seqlen_k, data.mask, device)
    if hidden is None:
        return None
    visible = _band(case) if data.mask is None else _lookup(~hidden)
    return create_block_mask(visible, None, None, case.seqlen_q, case.seqlen_k, device=str(device))


MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _band(case: Case) -> MaskMod:
    """Visibility by arithmetic, as FlexAttention's documentation recommends for causal and window."""
    offset = case.seqlen_k - case.seqlen_q if case.causal_alignment == "bottom-right" else 0
    left, right = case.window_bounds

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j >= 0
        if left is not None:
            seen = seen & (i + offset - j <= left)
        if right is not None:
            seen = seen & (j - i - offset <= right)
        return seen

    return visible


def _lookup(table: Tensor) -> MaskMod:
    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return table[i, j]

    return visible


def _packed_visibility(case: Case, device: torch.device) -> MaskMod:
    """Token i sees token j if both are of one sequence and the band within that sequence lets it."""
    bottom_right = case.causal_alignment == "bottom-right"
    left, right = case.window_bounds
    sequence_q, sequence_k, position_q, position_k = [], [], [], []
    for number, (seqlen_q, seqlen_k) in enumerate(case.sequences):
        sequence_q.append(torch.full((seqlen_q,), number))
        sequence_k.append(torch.full((seqlen_k,), number))
        position_q.append(torch.arange(seqlen_q) + (seqlen_k - seqlen_q if bottom_right else 0))
        position_k.append(torch.arange(seqlen_k))
    of_q, of_k, at_q, at_k = (torch.cat(x).to(device) for x in (sequence_q, sequence_k, position_q, position_k))

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = of_q[i] == of_k[j]
        if left is not None:
            seen = seen & (at_q[i] - at_k[j] <= left)
        if right is not None:
            seen = seen & (at_k[j] - at_q[i] <= right)
        return seen

    return visible


def _why_no_gpu_package(package: str, case: Case, data: Data) -> str | None:
    """What the GPU packages flash-attn and xformers have in common: where and for what they run at all."""
    if find_spec(package) is None:
        return f"the package {package} is not installed"
    if data.q.device.type != "cuda":
        return f"{package} runs on CUDA devices only"
    if case.dtype not in ("float16", "bfloat16"):
        return f"{package} computes float16 and bfloat16, not {case.dtype}"
    return None


class FlashAttn(Rival):
    """The package flash-attn (FlashAttention-2): flash_attn_func and flash_attn_varlen_func."""

    name = "flash-attn"

    def why_not(self, case: Case, data: Data) -> str | None:
        """CUDA, 16 bits, bottom-right alignment, no dense mask, equal head dims of at most 256."""
        unavailable = _why_no_gpu_package("flash_attn", case, data)
        if unavailable is not None:
            return unavailable
        if case.mask != "none":
            return "flash-attn takes no dense mask"
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


class Xformers(Rival):
    """xformers.ops.memory_efficient_attention."""

    name = "xformers"

    def why_not(self, case: Case, data: Data) -> str | None:
        """CUDA, 16 bits, dense, as many key heads as query heads, no window."""
        unavailable = _why_no_gpu_package("xformers", case, data)
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


class _SdpaKernel(Sdpa):
    """torch's scaled_dot_product_attention held to one of its GPU kernels, which `sdpa` chooses from by itself."""

    named_only = True
    kernel: SDPBackend

    def why_not(self, case: Case, data: Data) -> str | None:
        """CUDA, and whatever torch says when it is asked for this kernel alone."""
        if data.q.device.type != "cuda":
            return f"{self.name} runs on CUDA devices only"
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # torch warns of each thing that stands in the way
                self.forward(case, data)()
        except RuntimeError as error:
            return f"torch refuses: {str(error).splitlines()[0]}"
        return None

    def dense(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """One scaled_dot_product_attention under `sdpa_kernel`."""
        call = super().dense(case, data)

        def held() -> Tensor:
            with sdpa_kernel(self.kernel):
                return call()

        return held


class SdpaFlash(_SdpaKernel):
    """FlashAttention-2 as torch brings it along."""

    name, kernel = "sdpa-flash", SDPBackend.FLASH_ATTENTION


class SdpaCudnn(_SdpaKernel):
    """The attention of cuDNN."""

    name, kernel = "sdpa-cudnn", SDPBackend.CUDNN_ATTENTION


class SdpaEfficient(_SdpaKernel):
    """The memory-efficient attention of xformers as torch brings it along."""

    name, kernel = "sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION
