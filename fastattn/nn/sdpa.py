"""backend="torch": the modules on PyTorch's own kernel, to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .masks import spell_out_positions


def torch_attention(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """`fastattn.attention` of a "top-left" call by torch's scaled_dot_product_attention.

    The modules refuse softcap and sinks, which torch lacks, when they are built. torch's dropout has its own
    mask, and torch leaves rows that see no key to its kernels.
    """
    plain_causal = options["causal"] and all(
        options[name] is None for name in ("window", "alibi_slopes", "mask", "bias")
    )
    mask = None
    if not plain_causal:
        mask = _one_mask(spell_out_positions(options, q.shape[2], k.shape[2], q.device), q.dtype)
    # The operator itself, which `fastattn.integrations.torch.use` leaves alone: torch was asked for by name.
    return torch.ops.aten.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=options["dropout_p"],
        is_causal=plain_causal,
        scale=options["scale"],
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _one_mask(options: dict[str, Any], dtype: torch.dtype) -> Tensor | None:
    mask, bias = options["mask"], options["bias"]
    if bias is None:
        return mask
    bias = bias.to(dtype)
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)
