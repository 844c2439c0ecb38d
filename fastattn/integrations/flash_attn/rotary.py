"""flash_attn.layers.rotary: rotary position embedding of queries or keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rotary import Rotary, apply_rotary
from .arguments import check_tables, check_values

__all__ = ["apply_rotary_emb", "apply_rotary_emb_func"]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates the first rotary_dim features of x by the angles of their positions, in float32; differentiable in x.

        x               (batch, seqlen, nheads, headdim), or (total, nheads, headdim) with cu_seqlens
        cos, sin        (seqlen_rotary, rotary_dim / 2): a row for each position
        interleaved     pairs features 2i and 2i + 1 (GPT-J) instead of i and i + rotary_dim / 2 (GPT-NeoX)
        inplace         write the result into x and return that
        seqlen_offsets  the position of each sequence's first token, int or (batch,), integer
        cu_seqlens      (batch + 1,), integer: where packed sequences begin
        max_seqlen      not needed here

    Returns x's shape and dtype. Raises TypeError or ValueError if a shape does not fit, or, where that costs nothing,
    on the CPU, if a position is not in the tables.
    """
    wanted = "(batch, seqlen, nheads, headdim)" if cu_seqlens is None else "(total, nheads, headdim)"
    if x.ndim != wanted.count(",") + 1:
        raise ValueError(f"x must have shape {wanted}, got {tuple(x.shape)}")
    check_tables(x.shape[-1], cos=cos, sin=sin)
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(seqlen_offsets, Tensor) and tuple(seqlen_offsets.shape) != (batch,):
        raise ValueError(
            f"seqlen_offsets must be an int or have shape (batch,) = ({batch},), got {tuple(seqlen_offsets.shape)}"
        )
    positions = _positions(x, seqlen_offsets, cu_seqlens)
    check_values("seqlen_offsets plus the token", positions, cos.shape[0] - 1, "the last row of cos")
    rotated = rotate(x if cu_seqlens is None else x[None], Rotary(cos, sin, interleaved), positions)
    rotated = rotated if cu_seqlens is None else rotated[0]
    return x.copy_(rotated) if inplace else rotated


apply_rotary_emb_func = apply_rotary_emb


def rotate(x: Tensor, tables: Rotary, positions: Tensor) -> Tensor:
    """x (batch, seqlen, nheads, headdim) by the angles at positions (seqlen,) or (batch, seqlen); contiguous."""
    return apply_rotary(x.transpose(1, 2), tables, positions).transpose(1, 2).contiguous()


def _positions(x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(seqlen,) or (batch, seqlen); of packed sequences (1, total)."""
    if cu_seqlens is None:
        steps = torch.arange(x.shape[1], device=x.device)
        return steps + (offsets[:, None] if isinstance(offsets, Tensor) else offsets)
    steps = torch.arange(x.shape[0], device=x.device)
    # Tokens behind the last sequence mean nothing, and stand with it.
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), steps.to(cu_seqlens.dtype), right=True)
    sequence = sequence.clamp(max=cu_seqlens.shape[0] - 2)
    within = steps - cu_seqlens[sequence]
    return (within + (offsets[sequence] if isinstance(offsets, Tensor) else offsets))[None]
