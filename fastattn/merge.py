"""Merging attention results over disjoint sets of keys.

Source: the rescaling of partial softmax results, as in Milakov and Gimelshein, "Online normalizer calculation for
softmax" (2018), and ring attention. Kernels merge what they compute over parts of the keys by the same formula, in
units of log2: csrc/cpu/kernels/combine.h, csrc/cuda/common/combine_state.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_states(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint key sets, from the results over each of them; exact and differentiable.

    outs: n tensors (batch, heads_q, seqlen_q, head_dim_v), or (total_q, heads_q, head_dim_v) for varlen; as a sequence
    or stacked along a new first dimension. lses: n tensors (batch, heads_q, seqlen_q), or (heads_q, total_q).
    A sink must have been part of at most one of the calls.

    Returns (out, lse): out with the dtype of outs, lse float32 (float64 for float64). A row that sees no key in any
    set gives out = 0 and lse = -inf.
    Raises TypeError or ValueError if there is nothing to merge or shapes do not fit.
    """
    outs, lses = list(outs), list(lses)
    _check(outs, lses)
    dtype = torch.promote_types(outs[0].dtype, torch.float32)
    lses = [_without_flash_infinity(out, lse.to(dtype)) for out, lse in zip(outs, lses, strict=True)]
    row_max = torch.stack([lse.detach() for lse in lses]).amax(dim=0)
    empty = row_max == -torch.inf
    row_max = row_max.masked_fill(empty, 0.0)
    weights = [torch.exp(lse - row_max) for lse in lses]
    row_sum = torch.stack(weights).sum(dim=0).masked_fill(empty, 1.0)
    merged = torch.zeros_like(outs[0], dtype=dtype)
    for out, lse, weight in zip(outs, lses, weights, strict=True):
        share = _like_out(weight / row_sum, out)
        # 0 * NaN is NaN: a state without keys contributes nothing, whatever its out holds.
        merged = merged + share * out.to(dtype).masked_fill(_like_out(lse == -torch.inf, out), 0.0)
    lse = (row_max + torch.log(row_sum)).masked_fill(empty, -torch.inf)
    return merged.to(outs[0].dtype), lse


def _without_flash_infinity(out: Tensor, lse: Tensor) -> Tensor:
    """lse with -inf for rows without keys, also where it said +inf."""
    if out.shape[-1] == 0:
        return lse  # no out tells an empty row from one whose sum is infinite
    nothing = (out == 0).all(dim=-1)
    return lse.masked_fill((lse == torch.inf) & (nothing.transpose(0, 1) if out.ndim == 3 else nothing), -torch.inf)


def _like_out(rows: Tensor, out: Tensor) -> Tensor:
    """A value per row, shaped to multiply out; varlen keeps heads first in lse and tokens first in out."""
    return (rows.transpose(0, 1) if out.ndim == 3 else rows)[..., None]


def _check(outs: list[Tensor], lses: list[Tensor]) -> None:
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"outs and lses must hold the same number of states, at least 1, got {len(outs)} and {len(lses)}"
        )
    for name, states in (("outs", outs), ("lses", lses)):
        for i, x in enumerate(states):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name}[{i}] must be a floating point tensor, got {got}")
    shape = outs[0].shape
    if len(shape) not in (3, 4):
        raise ValueError(
            "outs[0] must have shape (batch, heads_q, seqlen_q, head_dim_v) or (total_q, heads_q, head_dim_v), "
            f"got {tuple(shape)}"
        )
    rows = (shape[1], shape[0]) if len(shape) == 3 else shape[:3]
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != shape or out.dtype != outs[0].dtype or out.device != outs[0].device:
            raise ValueError(
                f"outs[{i}] must be like outs[0], {tuple(shape)} {outs[0].dtype} on {outs[0].device}, "
                f"got {tuple(out.shape)} {out.dtype} on {out.device}"
            )
        if tuple(lse.shape) != tuple(rows) or lse.device != out.device:
            raise ValueError(
                f"lses[{i}] must have shape {tuple(rows)} on {out.device}, got {tuple(lse.shape)} on {lse.device}"
            )
