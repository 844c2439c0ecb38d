"""Rotary position embedding: rotates pairs of features by an angle that grows with the position.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .problem import check_rank, check_rotary


class Rotary(NamedTuple):
    """The tables of a rotary embedding.

    cos, sin: (max_positions, rotary_dim // 2), floating point; rotary_dim may be less than the head dimension, the
    features behind it pass unchanged. interleaved=False pairs feature i with i + rotary_dim // 2 (Llama, GPT-NeoX),
    True pairs feature 2i with 2i + 1 (GPT-J).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


def apply_rotary(x: Tensor, rotary: Rotary | tuple[Tensor, Tensor], positions: Tensor) -> Tensor:
    """Rotates x by the angles of its positions; differentiable in x.

    x: (batch, heads, seqlen, head_dim). rotary: the tables; a pair (cos, sin) is not interleaved.
    positions: (seqlen,) or (batch, seqlen), integer, rows of the tables.
    Returns a tensor of x's shape and dtype, computed in float32 (float64 for float64).
    Raises TypeError or ValueError if shapes do not fit or positions are not integers.
    """
    cos, sin, interleaved = Rotary(*rotary)
    check_rank("x", x.shape, "(batch, heads, seqlen, head_dim)")
    check_rotary(cos.shape, sin.shape, x.shape[3])
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions must have dtype torch.int32 or torch.int64, got {positions.dtype}")
    if tuple(positions.shape) not in ((x.shape[2],), (x.shape[0], x.shape[2])):
        raise ValueError(
            f"positions must have shape (seqlen,) = ({x.shape[2]},) or (batch, seqlen) = "
            f"({x.shape[0]}, {x.shape[2]}), got {tuple(positions.shape)}"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = positions if positions.ndim == 2 else positions[None]
    return rotate_pairs(x, cos.to(dtype)[rows][:, None], sin.to(dtype)[rows][:, None], interleaved)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates x by angles given as cos and sin, (batch or 1, 1, seqlen, rotary_dim // 2), in their dtype.

    Operations that TorchScript compiles.
    """
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half].to(cos.dtype), x[..., 2 * half :]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
