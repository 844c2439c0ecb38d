"""What is measured: fastattn's backends and other exact attention, one file for each.

`RIVALS` has the others by name. A new one is a file here and a row there.
"""

from .base import Call, PerSequence, Rival
from .eager import Eager, eager_attention
from .fastattn import Fastattn
from .flash_attn import FlashAttn
from .flex import Flex
from .sdpa import Sdpa
from .sdpa_kernels import SdpaCudnn, SdpaEfficient, SdpaFlash
from .xformers import Xformers

__all__ = ["DEFAULT_RIVALS", "RIVALS", "Call", "Eager", "Fastattn", "PerSequence", "Rival", "Sdpa", "eager_attention"]

_RIVALS: tuple[type[Rival], ...] = (Sdpa, Eager, Flex, FlashAttn, Xformers, SdpaFlash, SdpaCudnn, SdpaEfficient)
RIVALS = {rival.name: rival for rival in _RIVALS}
DEFAULT_RIVALS = tuple(name for name, rival in RIVALS.items() if not rival.compiles and not rival.named_only)
