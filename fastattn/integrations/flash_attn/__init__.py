"""The functions of the package flash-attn, version 2.8, on fastattn: code written for its GPUs runs anywhere.

    from fastattn.integrations.flash_attn import flash_attn_func      # by name
    fastattn.integrations.flash_attn.install()                        # or: `import flash_attn` finds it

Same signatures, layouts, results and alignment. On top of flash-attn: float32 and float64, any head dimension and
page size, a head dimension of v of its own, gradients through softmax_lse. Always deterministic.
"""

from .bert_padding import index_first_axis, index_put_first_axis, pad_input, unpad_input
from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from .installer import VERSION, install
from .rotary import apply_rotary_emb

__version__ = VERSION

__all__ = [
    "apply_rotary_emb",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "index_put_first_axis",
    "install",
    "pad_input",
    "unpad_input",
]
