"""Position encodings that are added to embeddings, and the slopes of ALiBi."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_count, check_number
from .recorded import fx_leaf, is_recorded, is_scripting
from .table import Table, angles


class LearnedPositionalEncoding(nn.Module):
    """Adds a learned vector per position.

        max_length   number of positions
        dim          width of the embeddings

    forward(x, positions): x (batch, seqlen, dim), floating; positions (seqlen,) or (batch, seqlen), integers
    from 0 to max_length - 1; None = 0, 1, 2, ... Returns x's shape and dtype.
    Raises TypeError or ValueError if shapes do not fit or a position reaches max_length.
    """

    def __init__(
        self,
        max_length: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("max_length", max_length)
        check_count("dim", dim)
        self.max_length, self.dim = max_length, dim
        self.weight = nn.Parameter(torch.empty(max_length, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the vectors from the standard normal distribution, as torch.nn.Embedding does."""
        nn.init.normal_(self.weight)

    def extra_repr(self) -> str:
        """What print(module) shows between the brackets."""
        return f"{self.max_length}, {self.dim}"

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x plus its positions' vectors; see the class."""
        if not is_scripting():
            node = fx_leaf(self, x, positions)
            if node is not None:
                return node
            if not is_recorded():
                self._check(x, positions)
        if positions is None:
            return x + self.weight[: x.shape[1]].to(x.dtype)
        return x + nn.functional.embedding(positions, self.weight).to(x.dtype)

    def _check(self, x: Tensor, positions: Tensor | None) -> None:
        _check_embeddings(x, self.dim, positions)
        if positions is None:
            if x.shape[1] > self.max_length:
                raise ValueError(f"x must have at most max_length = {self.max_length} positions, got {x.shape[1]}")
            return
        if positions.device.type != "cpu" or torch.compiler.is_compiling() or positions.numel() == 0:
            return
        low, high = (int(p) for p in torch.aminmax(positions))
        if low < 0 or high >= self.max_length:
            wrong = low if low < 0 else high
            raise ValueError(f"positions must be from 0 to max_length - 1 = {self.max_length - 1}, got {wrong}")


class SinusoidalPositionalEncoding(nn.Module):
    """Adds sin(position * f) and cos(position * f) in turn, frequencies f from 1 down to nearly 1 / base.

        dim     width of the embeddings, even or odd
        base    10000 in the paper

    forward(x, positions): x (batch, seqlen, dim), floating; positions (seqlen,) or (batch, seqlen), integers
    without a limit; None = 0, 1, 2, ... Returns x's shape and dtype. No parameters, no buffers.
    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.5.
    Raises TypeError or ValueError if shapes do not fit.
    """

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        check_count("dim", dim)
        check_number("base", base)
        if base <= 1:
            raise ValueError(f"base must be greater than 1, got {base}")
        self.dim, self.base = dim, float(base)
        self._table = Table(self._encode)

    def extra_repr(self) -> str:
        """What print(module) shows between the brackets."""
        return f"{self.dim}, base={self.base}"

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x plus its positions' encodings; see the class."""
        if not is_scripting():
            node = fx_leaf(self, x, positions)
            if node is not None:
                return node
            if not is_recorded():
                _check_embeddings(x, self.dim, positions)
                if positions is None:
                    return x + self._table.rows(x.shape[1], x.device, x.dtype)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        return x + self._encode(positions, x.dtype)

    def _encode(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., dim)."""
        turns = angles(positions, self.dim, self.base)
        pairs = torch.stack((turns.sin(), turns.cos()), dim=-1).flatten(-2)
        return pairs[..., : self.dim].to(dtype)


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """One slope per head, (num_heads,) float32, for the `alibi_slopes` of `fastattn.attention`.

    For a power of two: 2^(-8/n), 2^(-16/n), ..., 2^-8. For any other n: the slopes of the next lower power of
    two p, then every other slope of 2p, beginning with the first, until there are n.
    Source: Press et al., "Train Short, Test Long: Attention with Linear Biases" (2022), and its published
    code.
    Raises TypeError or ValueError unless num_heads is a positive integer.
    """
    check_count("num_heads", num_heads)
    return slopes_of_heads(torch.arange(num_heads, device=device), num_heads)


def slopes_of_heads(heads: Tensor, num_heads: int) -> Tensor:
    """`alibi_slopes` of the heads with these numbers, int64, on their device; operations that TorchScript compiles."""
    power = 1
    while 2 * power <= num_heads:
        power *= 2
    x = heads.to(torch.float32 if heads.device.type == "mps" else torch.float64)
    exponents = torch.where(x < power, (x + 1) * (-8.0 / power), (2 * (x - power) + 1) * (-4.0 / power))
    return torch.exp2(exponents).to(torch.float32)


def _check_embeddings(x: Tensor, dim: int, positions: Tensor | None) -> None:
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"x must have shape (batch, seqlen, {dim}), got {tuple(x.shape)}")
    if positions is None:
        return
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions must have dtype torch.int32 or torch.int64, got {positions.dtype}")
    if tuple(positions.shape) not in ((x.shape[1],), tuple(x.shape[:2])):
        rows = tuple(x.shape[:2])
        raise ValueError(
            f"positions must have shape (seqlen,) = ({rows[1]},) or (batch, seqlen) = {rows}, "
            f"got {tuple(positions.shape)}"
        )
