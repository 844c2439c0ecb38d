"""fastattn: exact fused attention for PyTorch, one API with one meaning on every machine."""

from . import reference
from .functional import (
    Report,
    Rotary,
    apply_rotary,
    attention,
    attention_varlen,
    attention_with_kv_cache,
    available_backends,
    explain,
    merge_states,
    scaled_dot_product_attention,
)

__version__ = "0.1.0"

__all__ = [
    "Report",
    "Rotary",
    "__version__",
    "apply_rotary",
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "available_backends",
    "explain",
    "merge_states",
    "reference",
    "scaled_dot_product_attention",
]
