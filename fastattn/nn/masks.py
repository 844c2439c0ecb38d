"""From the masks of torch.nn.MultiheadAttention to the mask and bias of `fastattn.attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_EXPECTED = "torch.bool (True = not allowed to attend) or floating point (added to the scores)"


def check_mask(name: str, mask: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    """A bool or floating mask of one of the shapes."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must have dtype {_EXPECTED}, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must have shape {expected}, got {tuple(mask.shape)}")


def mask_and_bias(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, heads: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """(mask, bias), each broadcastable to (batch, heads, seqlen_q, seqlen_k) and as small as the masks allow.

    key_padding_mask (batch, seqlen_k); attn_mask (seqlen_q, seqlen_k) or (batch * heads, seqlen_q, seqlen_k);
    bool (True = not allowed) or floating. Only two floating masks take a tensor of the size of both.
    """
    padding = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    pattern = attn_mask
    if pattern is not None and pattern.ndim == 3:
        pattern = pattern.unflatten(0, (-1, heads))
    if padding is None or pattern is None:
        given = padding if pattern is None else pattern
        if given is None:
            return None, None
        return (~given, None) if given.dtype == torch.bool else (None, given)
    if padding.dtype == torch.bool and pattern.dtype == torch.bool:
        if pattern.ndim == 4:
            return ~(padding | pattern), None
        # As a bias the pattern stays (seqlen_q, seqlen_k); combined, each sequence of the batch would get its
        # own.
        blocked = torch.zeros(pattern.shape, dtype=dtype, device=pattern.device).masked_fill(pattern, -torch.inf)
        return ~padding, blocked
    if padding.dtype == torch.bool:
        return ~padding, pattern
    if pattern.dtype == torch.bool:
        return ~pattern, padding
    return None, padding + pattern


def spell_out_positions(options: dict[str, Any], seqlen_q: int, seqlen_k: int, device: torch.device) -> dict[str, Any]:
    """The options of a "top-left" call with causal, window and alibi_slopes turned into its mask and bias."""
    left, right = options["window"] or (None, None)
    if options["causal"]:
        right = 0
    slopes, mask, bias = options["alibi_slopes"], options["mask"], options["bias"]
    mask, bias = positions_as_masks(mask, bias, seqlen_q, seqlen_k, left, right, slopes, device)
    return {**options, "causal": False, "window": None, "alibi_slopes": None, "mask": mask, "bias": bias}


def positions_as_masks(
    mask: Tensor | None,
    bias: Tensor | None,
    seqlen_q: int,
    seqlen_k: int,
    left: int | None,
    right: int | None,
    slopes: Tensor | None,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """(mask, bias) with a window (left, right) and ALiBi's slopes (heads,) in them."""
    distance = torch.arange(seqlen_q, device=device)[:, None] - torch.arange(seqlen_k, device=device)
    if left is not None:
        visible = distance <= left
        mask = visible if mask is None else mask & visible
    if right is not None:
        visible = distance >= -right
        mask = visible if mask is None else mask & visible
    if slopes is not None:
        penalty = -slopes[:, None, None] * distance.abs()
        bias = penalty if bias is None else bias + penalty
    return mask, bias


def reveal_more_keys(options: dict[str, Any], keys: int) -> dict[str, Any]:
    """Options without causal, window or ALiBi, widened by `keys` more keys at the end that every query sees."""
    mask, bias = options["mask"], options["bias"]
    return {
        **options,
        "mask": None if mask is None else torch.nn.functional.pad(mask, (0, keys), value=True),
        "bias": None if bias is None else torch.nn.functional.pad(bias, (0, keys)),
    }
