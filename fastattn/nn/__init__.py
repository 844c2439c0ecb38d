"""Modules on fastattn: multi-head attention, position encodings, key/value caches, transformers."""

from .attention import MultiheadAttention
from .cache import KVCache
from .language_model import TransformerLM
from .positional import LearnedPositionalEncoding, SinusoidalPositionalEncoding, alibi_slopes
from .replace import replace_attention
from .rotary import RotaryEmbedding
from .sampling import Sampler
from .transformer import Transformer

__all__ = [
    "KVCache",
    "LearnedPositionalEncoding",
    "MultiheadAttention",
    "RotaryEmbedding",
    "Sampler",
    "SinusoidalPositionalEncoding",
    "Transformer",
    "TransformerLM",
    "alibi_slopes",
    "replace_attention",
]


def __dir__() -> list[str]:
    """The public names; the modules that define them are internal."""
    return list(__all__)
