"""xformers' memory_efficient_attention by its documented formula, and the masks that its documentation describes.

Each mask class says in sentences which keys a query sees; here it is an additive matrix of 0 and -inf made from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask",
    "BlockDiagonalMask",
    "LocalAttentionFromBottomRightMask",
    "LowerTriangularFromBottomRightLocalAttentionMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularMask",
    "LowerTriangularMaskWithTensorBias",
    "memory_efficient_attention",
]


class Mask(Protocol):
    """Which keys a query sees."""

    def added(self, queries: int, keys: int) -> Tensor:
        """What is added to the scores, (..., queries, keys)."""


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | Mask | None = None, *, scale: float | None = None
) -> Tensor:
    """softmax(query @ key^T * scale + attn_bias) @ value; tensors are (batch, seqlen, heads, head_dim)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_bias is not None:
        scores = scores + (attn_bias if isinstance(attn_bias, Tensor) else attn_bias.added(*scores.shape[-2:]))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _hide(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)


def _from_start(queries: int, keys: int) -> Tensor:
    """How much farther from the first key a key is than the query from the first query."""
    return torch.arange(keys) - torch.arange(queries)[:, None]


def _from_end(queries: int, keys: int) -> Tensor:
    """How much nearer to the last key a key is than the query to the last query."""
    return torch.arange(queries - 1, -1, -1)[:, None] - torch.arange(keys - 1, -1, -1)


class LowerTriangularMask:
    """No key farther from the first key than the query is from the first query."""

    def added(self, queries: int, keys: int) -> Tensor:
        return _hide(_from_start(queries, keys) > 0)


class LowerTriangularMaskWithTensorBias(NamedTuple):
    """LowerTriangularMask, and a bias."""

    bias: Tensor

    def added(self, queries: int, keys: int) -> Tensor:
        return LowerTriangularMask().added(queries, keys) + self.bias


class LowerTriangularFromBottomRightMask:
    """No key nearer to the last key than the query is to the last query."""

    def added(self, queries: int, keys: int) -> Tensor:
        return _hide(_from_end(queries, keys) > 0)


class LowerTriangularFromBottomRightLocalAttentionMask(NamedTuple):
    """For a query X away from the last: no key less than X, or X + window_size and more, away from the last key."""

    window_size: int

    def added(self, queries: int, keys: int) -> Tensor:
        nearer = _from_end(queries, keys)
        return _hide((nearer > 0) | (-nearer >= self.window_size))


class LocalAttentionFromBottomRightMask(NamedTuple):
    """Query i sees key j if i - window_left <= j + queries - keys <= i + window_right."""

    window_left: int
    window_right: int

    def added(self, queries: int, keys: int) -> Tensor:
        j, i = torch.arange(keys) + queries - keys, torch.arange(queries)[:, None]
        return _hide((j < i - self.window_left) | (j > i + self.window_right))


class BlockDiagonalMask(NamedTuple):
    """A query sees the keys of its own block, as the mask of the block says."""

    q_seqlen: Sequence[int]
    kv_seqlen: Sequence[int]
    within: Mask | None = None
    kv_padding: int | None = None

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int]) -> BlockDiagonalMask:
        return cls(q_seqlen, kv_seqlen)

    def added(self, queries: int, keys: int) -> Tensor:
        added = torch.full((queries, keys), -torch.inf)
        row = column = 0
        for block_queries, block_keys in zip(self.q_seqlen, self.kv_seqlen, strict=True):
            block = added[row : row + block_queries, column : column + block_keys]
            block[:] = 0 if self.within is None else self.within.added(block_queries, block_keys)
            row += block_queries
            column += block_keys if self.kv_padding is None else self.kv_padding
        assert (row, column) == (queries, keys)
        return added


class BlockDiagonalCausalMask:
    """BlockDiagonalMask with a LowerTriangularMask in each block."""

    @staticmethod
    def from_seqlens(q_seqlen: Sequence[int], kv_seqlen: Sequence[int]) -> BlockDiagonalMask:
        return BlockDiagonalMask(q_seqlen, kv_seqlen, LowerTriangularMask())


class BlockDiagonalCausalFromBottomRightMask:
    """BlockDiagonalMask with a LowerTriangularFromBottomRightMask in each block."""

    @staticmethod
    def from_seqlens(q_seqlen: Sequence[int], kv_seqlen: Sequence[int]) -> BlockDiagonalMask:
        return BlockDiagonalMask(q_seqlen, kv_seqlen, LowerTriangularFromBottomRightMask())


class BlockDiagonalCausalWithOffsetPaddedKeysMask:
    """The same over keys that are padded to kv_padding in each block, of which kv_seqlen are in use."""

    @staticmethod
    def from_seqlens(q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int]) -> BlockDiagonalMask:
        return BlockDiagonalMask(q_seqlen, kv_seqlen, LowerTriangularFromBottomRightMask(), kv_padding)
