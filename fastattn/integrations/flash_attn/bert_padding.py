"""flash_attn.bert_padding: batches with padding to packed tokens and back."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input (rows, ...), indices (n,), integer -> (n, ...), the rows named; differentiable."""
    _check_indices(indices)
    return input[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """values (n, ...), indices (n,), distinct -> (first_axis_dim, ...) with these rows, else zeros; differentiable."""
    _check_indices(indices)
    if values.shape[:1] != indices.shape:
        raise ValueError(f"values must have as many rows as indices, {len(indices)}, got shape {tuple(values.shape)}")
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, one behind the other.

        hidden_states   (batch, seqlen, ...)
        attention_mask  (batch, seqlen), bool or integer: 1 is a token, 0 is padding
        unused_mask     (batch, seqlen), likewise: 1 is a token that is packed, but not counted as used

    Returns hidden_states (total, ...); indices (total,) of the tokens in the flattened batch; cu_seqlens (batch + 1,),
    int32; the longest sequence, an int, for which a GPU is waited for; the used tokens of each sequence, (batch,),
    int32. Differentiable in hidden_states. Raises ValueError if a shape does not fit.
    """
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"{name} must have shape (batch, seqlen) = {tuple(hidden_states.shape[:2])}, got {tuple(mask.shape)}"
            )
    packed = attention_mask != 0
    used = packed.sum(dim=1, dtype=torch.int32)
    if unused_mask is not None:
        packed = packed | (unused_mask != 0)
    lengths = packed.sum(dim=1, dtype=torch.int32)
    indices = packed.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if len(lengths) else 0
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`: (total, ...) and its indices -> (batch, seqlen, ...), zeros where there is padding.

    Differentiable in hidden_states. Raises ValueError if a shape does not fit.
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _check_indices(indices: Tensor) -> None:
    if indices.ndim != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices must be integers of shape (n,), got {indices.dtype} of shape {tuple(indices.shape)}")
