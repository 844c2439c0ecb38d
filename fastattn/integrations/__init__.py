"""Ways to put fastattn under code that was written for other attention interfaces."""

import typing as _typing

from ..submodules import on_demand as _on_demand

if _typing.TYPE_CHECKING:
    from . import flash_attn as flash_attn
    from . import huggingface as huggingface
    from . import torch as torch
else:
    __getattr__, __dir__ = _on_demand(__name__, ("flash_attn", "huggingface", "torch"))
