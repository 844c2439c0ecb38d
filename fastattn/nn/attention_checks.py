"""What MultiheadAttention checks of its arguments, when it is built and when it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..backends.dispatch import BACKENDS
from .cache import KVCache
from .checks import check_count, check_number
from .rotary import RotaryEmbedding

if TYPE_CHECKING:
    from .attention import MultiheadAttention

Window = tuple[int | None, int | None] | None


def check_features(
    head_dim: int, window: Any, softcap: Any, rotary: Any, sinks: bool, scale: Any, backend: Any
) -> None:
    """The extras; the functions would refuse them too, but only once they are called."""
    if window is not None and (not isinstance(window, (tuple, list)) or len(window) != 2):
        raise TypeError(f"window must be a pair (left, right) of integers or None, got {window!r}")
    for side in window or ():
        if side is not None:
            check_count("window's left and right", side, least=0)
    for name, number in (("softcap", softcap), ("scale", scale)):
        if number is not None:
            check_number(name, number)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, or None to switch it off, got {softcap}")
    if rotary is not None and not isinstance(rotary, RotaryEmbedding):
        raise TypeError(f"rotary must be a fastattn.nn.RotaryEmbedding, got {type(rotary).__name__}")
    if rotary is not None and rotary.dim != head_dim:
        raise ValueError(f"rotary must have dim = embed_dim // num_heads = {head_dim}, got {rotary.dim}")
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a string or None, got {type(backend).__name__} {backend!r}")
    names = ["torch", *(known.name for known in BACKENDS)]
    if backend is not None and backend not in names:
        raise ValueError(f"backend must be None or one of {names}, got {backend!r}")
    if backend == "torch" and (softcap is not None or sinks):
        raise ValueError('backend "torch" has neither softcap nor sinks, got ' + ("sinks" if sinks else "softcap"))


def check_inputs(module: MultiheadAttention, query: Any, key: Any, value: Any, cached: bool) -> None:
    """Types and shapes of query, key and value; the last two may be missing with a cache."""
    given = [("query", query, module.embed_dim)]
    if not cached or key is not None:
        given += [("key", key, module.kdim), ("value", value, module.vdim)]
    for name, x, width in given:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.is_nested:
            raise TypeError(f"{name} is a NestedTensor, but query is dense: nest all of them or none")
        if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
            order = "(batch, seqlen, {})" if module.batch_first else "(seqlen, batch, {})"
            expected = f"(seqlen, {width})" if query.dim() == 2 else order.format(width)
            raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    if len(given) == 1:
        return
    if key.shape[:-1] != value.shape[:-1]:
        shapes = f"{tuple(key.shape)} and {tuple(value.shape)}"
        raise ValueError(f"key and value must have the same batch and seqlen, got {shapes}")
    batch_dim = 0 if module.batch_first else 1
    if query.dim() == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
        raise ValueError(f"query and key must have the same batch, got {tuple(query.shape)} and {tuple(key.shape)}")


def check_positions(module: MultiheadAttention, query: Tensor, key: Tensor | None) -> None:
    """Positions serve the rotary embedding of a self-attention."""
    if module.rotary is None:
        raise ValueError("positions need a module with rotary, got positions for one without")
    if key is None or query.shape[:-1] != key.shape[:-1]:
        shape = None if key is None else tuple(key.shape)
        raise ValueError(f"positions are for self-attention, but query has shape {tuple(query.shape)}, key {shape}")


def check_cached(
    module: MultiheadAttention,
    kv_cache: Any,
    key: Any,
    value: Any,
    need_weights: bool,
    positions: Tensor | None,
) -> None:
    """What a call with a cache cannot have."""
    if not isinstance(kv_cache, KVCache):
        raise TypeError(f"kv_cache must be a fastattn.nn.KVCache, got {type(kv_cache).__name__}")
    if (key is None) != (value is None):
        raise ValueError("key and value go together, got one of them as None")
    reasons = {
        "need_weights=False": need_weights,
        "positions=None (the cache knows them)": positions is not None,
        "a module without add_bias_kv and add_zero_attn": module.bias_k is not None or module.add_zero_attn,
        "evaluation mode, or dropout=0": module.training and module.dropout > 0,
        "a backend of fastattn": module.backend == "torch",
    }
    for needed, missing in reasons.items():
        if missing:
            raise ValueError(f"kv_cache needs {needed}")
