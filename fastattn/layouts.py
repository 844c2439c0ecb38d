"""How the values of tensors lie in memory, as one key to look up what is known of calls like this one."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

try:
    from . import _cpu
except ImportError:  # running from a source tree that was never built
    _cpu = None  # type: ignore[assignment]

NO_LAYOUT = (TypeError, RuntimeError, BufferError)
"""What `layouts` may raise for tensors that have none: sparse ones, or such without memory."""


def attributes(*tensors: Tensor) -> Hashable:
    """The key from the tensors' Python attributes, for versions of torch that do not export DLPack's table."""
    return tuple([(x.shape, x.stride(), x.dtype, x.device, x.is_neg(), x._is_zerotensor()) for x in tensors])


_native = None if _cpu is None else _cpu.layout_reader(torch.Tensor)

layouts: Callable[..., Hashable] = attributes if _native is None else _native
"""layouts(*tensors): equal only if the tensors differ in nothing but where their values are and what they are."""
