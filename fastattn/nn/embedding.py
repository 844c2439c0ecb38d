"""Token embeddings with positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .positional import LearnedPositionalEncoding, SinusoidalPositionalEncoding
from .recorded import is_scripting


class TokenEmbedding(nn.Module):
    """Token ids to vectors, plus positions if `positional` is "learned" or "sinusoidal", then dropout."""

    def __init__(self, vocab_size: int, dim: int, positional: str, max_length: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions: nn.Module | None = None
        if positional == "learned":
            self.positions = LearnedPositionalEncoding(max_length, dim)
        elif positional == "sinusoidal":
            self.positions = SinusoidalPositionalEncoding(dim)
        self.max_length = max_length if positional == "learned" else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, name: str, ids: Tensor, real: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """ids (batch, seqlen) -> (batch, seqlen, dim); `name` is what messages call them.

        Positions count the real tokens of a row (bool (batch, seqlen), None = all), or begin at start
        (batch,).
        """
        if not is_scripting():
            self.check_length(name, ids.shape[1])
        x = self.tokens(ids)
        if self.positions is not None:
            positions: Tensor | None = None
            if start is not None:
                positions = start[:, None] + torch.arange(ids.shape[1], device=ids.device)
            elif real is not None:
                positions = (real.to(torch.int64).cumsum(dim=1) - 1).clamp_min(0)
            x = self.positions(x, positions)
        return self.dropout(x)

    def check_length(self, name: str, length: int) -> None:
        """Raises ValueError if there are fewer learned positions than that."""
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"{name} must have at most max_length = {self.max_length} tokens per row, got {length}")
