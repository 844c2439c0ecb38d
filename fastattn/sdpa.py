"""torch.nn.functional.scaled_dot_product_attention in the terms of `fastattn.attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import DTYPES


class SdpaCall(NamedTuple):
    """A call of torch's function as the call of `fastattn.attention` that means the same.

    lead: the leading dimensions that torch's function returns. all_dropped: dropout_p is 1, which torch allows.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    lead: Sequence[int]
    all_dropped: bool

    def finish(self, out: Tensor) -> Tensor:
        """What torch's function returns, given what `fastattn.attention` does."""
        out = out * 0.0 if self.all_dropped else out
        return out if len(self.lead) == 2 else out.reshape(*self.lead, *out.shape[-2:])


def translate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> SdpaCall:
    """Arguments as in `fastattn.scaled_dot_product_attention`, cast as autocast wants them already.

    Raises TypeError or ValueError if an argument does not fit.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None when is_causal is True, got both")
    q, k, v, lead = _four_dimensional(query, key, value, enable_gqa)
    mask = bias = None
    if attn_mask is not None:
        _check_attn_mask(attn_mask, (*lead, q.shape[-2], k.shape[-2]))
        if attn_mask.ndim > 2 and len(lead) != 2:
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-2:]).reshape(*q.shape[:2], *attn_mask.shape[-2:])
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    all_dropped = dropout_p == 1  # torch allows it, and nothing is left
    options = {
        "causal": is_causal,
        "causal_alignment": "top-left",
        "mask": mask,
        "bias": bias,
        "scale": scale,
        "dropout_p": 0.0 if all_dropped else dropout_p,
    }
    return SdpaCall(q, k, v, options, lead, all_dropped)


def _four_dimensional(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Sequence[int]]:
    """Query, key and value as (batch, heads, seqlen, dim), and the leading dimensions that they came with."""
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.is_nested:
            raise TypeError(f"{name} must be a dense (strided) tensor, got a nested tensor: see attention_varlen")
        if x.ndim < 2:
            raise ValueError(f"{name} must have shape (..., seqlen, head_dim), got {tuple(x.shape)}")
    _check_sdpa(query, key, value)
    if enable_gqa:
        key, value = _grouped_heads(query, key, value)
        batches = [x.shape[:-3] for x in (query, key, value)]
        heads = [x.shape[-3:-2] for x in (query, key, value)]
    else:
        batches, heads = [x.shape[:-2] for x in (query, key, value)], [torch.Size()] * 3
    if batches[0] == batches[1] == batches[2]:  # what follows would take longer than a small call
        return _as_four(query), _as_four(key), _as_four(value), (*batches[0], *heads[0])
    try:
        batch = torch.broadcast_shapes(*batches)
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"the leading dimensions of query, key and value must broadcast, got {shapes}") from None
    lead = (*batch, *heads[0])
    query, key, value = (
        _as_four(x.expand(*batch, *h, *x.shape[-2:])) for x, h in zip((query, key, value), heads, strict=True)
    )
    return query, key, value, lead


def _check_sdpa(query: Tensor, key: Tensor, value: Tensor) -> None:
    """What `attention` would refuse as well, but under the names q, k and v."""
    if query.dtype not in DTYPES:
        raise TypeError(f"query must have dtype float32, float64, bfloat16 or float16, got {query.dtype}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, but query has {query.dtype}: they must be the same")
        if x.device != query.device:
            raise ValueError(f"{name} is on device {x.device}, but query is on {query.device}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have the head_dim of query, {query.shape[-1]}, got shape {tuple(key.shape)}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have the seqlen of key, {key.shape[-2]}, got shape {tuple(value.shape)}")


def _check_attn_mask(attn_mask: Tensor, target: Sequence[int]) -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask must have dtype torch.bool or a floating point dtype, got {attn_mask.dtype}")
    fits = attn_mask.ndim <= len(target) and all(
        size in (1, want) for size, want in zip(attn_mask.shape, target[len(target) - attn_mask.ndim :], strict=True)
    )
    if not fits:
        raise ValueError(
            f"attn_mask must be broadcastable to (..., seqlen_q, seqlen_k) = {tuple(target)}, "
            f"got shape {tuple(attn_mask.shape)}"
        )


def _grouped_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3:
            raise ValueError(
                f"{name} must have shape (..., heads, seqlen, head_dim) with enable_gqa, got {tuple(x.shape)}"
            )
    heads_q = query.shape[-3]
    for name, x in (("key", key), ("value", value)):
        if x.shape[-3] != heads_q and (x.shape[-3] == 0 or heads_q % x.shape[-3] != 0):
            raise ValueError(f"{name} must have a number of heads that divides query's {heads_q}, got {x.shape[-3]}")
    if key.shape[-3] == value.shape[-3]:
        return key, value
    repeated = (x.repeat_interleave(heads_q // x.shape[-3], dim=-3) for x in (key, value))
    return tuple(repeated)  # type: ignore[return-value]


def _as_four(x: Tensor) -> Tensor:
    if x.ndim == 4:
        return x
    if x.ndim < 4:
        return x[(None,) * (4 - x.ndim)]
    return x.flatten(0, -4)
