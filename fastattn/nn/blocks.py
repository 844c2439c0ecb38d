"""The layer that the transformers are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from .attention import MultiheadAttention
from .cache import KVCache
from .checks import check_count, check_divides, check_probability
from .recorded import is_scripting
from .rotary import RotaryEmbedding

POSITIONAL = ("learned", "sinusoidal", "rotary", "alibi")


class LayerCache(NamedTuple):
    """What one layer remembers between tokens: its own keys, and those of the memory it attends to."""

    own: KVCache
    memory: KVCache | None = None


class Block(nn.Module):
    """Self-attention, attention to a memory if `cross_attention`, feed-forward; each x + f(LayerNorm(x)).

    attention options as in MultiheadAttention; window, alibi and rotary, which go by positions, stay out of
    the attention to the memory.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_heads: int,
        *,
        dropout: float,
        cross_attention: bool = False,
        alibi: bool = False,
        rotary: RotaryEmbedding | None = None,
        window: tuple[int | None, int | None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()

        def attention(**more: Any) -> MultiheadAttention:
            return MultiheadAttention(dim, num_heads, dropout, batch_first=True, **options, **more)

        self.norm1 = nn.LayerNorm(dim)
        self.attention = attention(alibi=alibi, rotary=rotary, window=window)
        self.norm_memory = nn.LayerNorm(dim) if cross_attention else None
        self.cross_attention = attention() if cross_attention else None
        self.norm2 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, hidden_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden_dim, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        causal: bool,
        padding: Tensor | None = None,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
        cache: Any = None,  # a LayerCache, which TorchScript does not know
    ) -> Tensor:
        """x (batch, seqlen, dim), padding (batch, seqlen) with True = padding; memory likewise."""
        own, kept = None, None
        if not is_scripting() and cache is not None:
            own, kept = cache.own, cache.memory
            if kept is not None and not kept.is_empty:
                memory = None  # its keys and values have been projected once
        y = self.norm1(x)
        out, _ = self.attention(y, y, y, padding, need_weights=False, is_causal=causal, kv_cache=own)
        x = x + self.dropout(out)
        if self.cross_attention is not None and self.norm_memory is not None:
            y = self.norm_memory(x)
            out, _ = self.cross_attention(y, memory, memory, memory_padding, need_weights=False, kv_cache=kept)
            x = x + self.dropout(out)
        return x + self.dropout(self.feed_forward(self.norm2(x)))

    def new_cache(self, batch: int, capacity: int, page_size: int | None, memory_length: int | None) -> LayerCache:
        """Caches for `capacity` tokens, and for a memory of `memory_length`."""
        own = self.attention.new_cache(batch, capacity, page_size=page_size)
        if self.cross_attention is None or memory_length is None:
            return LayerCache(own)
        return LayerCache(own, self.cross_attention.new_cache(batch, memory_length))


def new_caches(
    blocks: nn.ModuleList, batch: int, capacity: int, page_size: int | None, memory_length: int | None = None
) -> list[LayerCache]:
    """One LayerCache per block."""
    caches = []
    for block in blocks:
        assert isinstance(block, Block)
        caches.append(block.new_cache(batch, capacity, page_size, memory_length))
    return caches


def position_options(kind: str, head_dim: int) -> dict[str, Any]:
    """The options of self-attention for the kinds of positions that act inside it; none for the others."""
    if kind == "rotary":
        return {"rotary": RotaryEmbedding(head_dim)}
    return {"alibi": True} if kind == "alibi" else {}


def check_model_sizes(
    vocab_size: int,
    embedding_dim: int,
    hidden_dim: int,
    num_heads: int,
    num_layers: int,
    max_length: int,
    dropout: float,
    positional: str,
) -> None:
    """What every transformer checks when it is built."""
    sizes = {
        "vocab_size": vocab_size,
        "embedding_dim": embedding_dim,
        "hidden_dim": hidden_dim,
        "num_heads": num_heads,
        "num_layers": num_layers,
        "max_length": max_length,
    }
    for name, size in sizes.items():
        check_count(name, size)
    check_divides("embedding_dim", embedding_dim, "num_heads", num_heads)
    check_probability("dropout", dropout)
    if positional not in POSITIONAL:
        raise ValueError(f"positional must be one of {POSITIONAL}, got {positional!r}")
    if positional == "rotary" and (embedding_dim // num_heads) % 2 != 0:
        raise ValueError(
            f'embedding_dim // num_heads must be even with positional="rotary", got {embedding_dim} // {num_heads}'
        )
