"""What is measured: fastattn's backends and other exact attention, behind one small interface."""

from .base import Call, Eager, Fastattn, PerSequence, Rival, Sdpa, eager_attention
from .optional import FlashAttn, Flex, SdpaCudnn, SdpaEfficient, SdpaFlash, Xformers

__all__ = [
    "Call",
    "Eager",
    "Fastattn",
    "FlashAttn",
    "Flex",
    "PerSequence",
    "Rival",
    "Sdpa",
    "SdpaCudnn",
    "SdpaEfficient",
    "SdpaFlash",
    "Xformers",
    "eager_attention",
]
