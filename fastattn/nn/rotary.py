"""Rotary position embedding as a module.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import Rotary, apply_rotary
from ..rotary import rotate_pairs
from .checks import check_count, check_number
from .recorded import fx_leaf, is_recorded, is_scripting
from .table import Table, angles


class RotaryEmbedding(nn.Module):
    """Rotates pairs of features of queries and keys by angles that grow with their positions.

        dim            head dimension of the tensors to rotate
        base           the pairs' angles per position run from 1 down to nearly 1 / base
        interleaved    False pairs feature i with i + rotary_dim // 2 (Llama, GPT-NeoX), True 2i with 2i + 1
                       (GPT-J)
        rotary_dim     how many of the leading features are rotated, even; None = dim. The rest passes
                       unchanged
        max_positions  rows that the tables begin with; they grow on demand

    forward(x, positions): x (batch, heads, seqlen, dim); positions (seqlen,) or (batch, seqlen), int32 or
    int64, any value; None = 0, 1, 2, ... Returns x's shape and dtype, differentiable.
    Has neither parameters nor buffers; rotates in float32 (float64 for float64), whatever the module's dtype.
    Raises TypeError or ValueError if a size or a shape does not fit.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        rotary_dim: int | None = None,
        max_positions: int = 2048,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        rotary_dim = dim if rotary_dim is None else rotary_dim
        check_count("rotary_dim", rotary_dim, least=2)
        check_count("max_positions", max_positions)
        if rotary_dim % 2 != 0 or rotary_dim > dim:
            raise ValueError(f"rotary_dim must be even and at most dim = {dim}, got {rotary_dim}")
        check_number("base", base)
        if base <= 1:
            raise ValueError(f"base must be greater than 1, got {base}")
        self.dim, self.base, self.interleaved = dim, float(base), bool(interleaved)
        self.rotary_dim, self.max_positions = rotary_dim, max_positions
        self._table = Table(self._cos_sin)

    def extra_repr(self) -> str:
        """What print(module) shows between the brackets."""
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}, rotary_dim={self.rotary_dim}"

    def tables(self, length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Rotary:
        """`fastattn.Rotary`, cos and sin (length, rotary_dim // 2), for the positions below `length`."""
        check_count("length", length, least=0)
        rows = length if torch.compiler.is_compiling() else max(length, self.max_positions)
        cos, sin = self._table.rows(rows, torch.device(device), dtype)[:, :length]
        return Rotary(cos, sin, self.interleaved)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotated x; see the class."""
        if not is_scripting():
            node = fx_leaf(self, x, positions)
            if node is not None:
                return node
            if not is_recorded():
                return self._forward(x, positions)
        if positions is None:
            positions = torch.arange(x.shape[2], device=x.device)
        turns = angles(positions, self.rotary_dim, self.base).unsqueeze(-3)
        if turns.dim() == 3:
            turns = turns.unsqueeze(0)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return rotate_pairs(x, turns.cos().to(dtype), turns.sin().to(dtype), self.interleaved)

    def _forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (batch, heads, seqlen, {self.dim}), got {tuple(x.shape)}")
        dtype = table_dtype(x.dtype)
        if positions is None:
            tables = self.tables(x.shape[2], x.device, dtype)
            return apply_rotary(x, tables, torch.arange(x.shape[2], device=x.device))
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"positions must have dtype torch.int32 or torch.int64, got {positions.dtype}")
        # A table of just these positions: any value will do, and nobody asks the device for the largest.
        cos, sin = self._cos_sin(positions.flatten(), dtype)
        rows = torch.arange(positions.numel(), device=positions.device).view(positions.shape)
        return apply_rotary(x, Rotary(cos, sin, self.interleaved), rows)

    def _cos_sin(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """(2, n, rotary_dim // 2)."""
        turns = angles(positions, self.rotary_dim, self.base)
        return torch.stack((turns.cos(), turns.sin())).to(dtype)


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which to rotate tensors of `dtype`."""
    return torch.promote_types(dtype, torch.float32)
