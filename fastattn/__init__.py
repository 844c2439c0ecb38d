"""fastattn: exact fused attention for PyTorch, one API with one meaning on every machine."""

import typing as _typing

from . import reference
from .autograd.flops import register_once_imported as _register_flop_formulas
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
from .submodules import on_demand as _on_demand

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

if _typing.TYPE_CHECKING:
    from . import integrations as integrations
    from . import nn as nn
else:  # not what a type checker sees, to which __getattr__ means that any name will do
    __getattr__, __dir__ = _on_demand(__name__, ("integrations", "nn"), __all__)

_register_flop_formulas()
