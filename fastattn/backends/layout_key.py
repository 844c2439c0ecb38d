"""One key for how tensors lie in memory, to look up what is known of calls like this one."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

try:
    from .. import _cpu
except ImportError:  # running from a source tree that was never built
    _cpu = None  # type: ignore[assignment]

NO_LAYOUT = (TypeError, RuntimeError, BufferError)
"""What `layout_key` may raise for tensors without a layout: sparse ones, and those without memory."""


def attributes(*tensors: Tensor) -> Hashable:
    """The key from the tensors' Python attributes, for versions of torch that do not export DLPack's table."""
    return tuple([(x.shape, x.stride(), x.dtype, x.device, x.is_neg(), x._is_zerotensor()) for x in tensors])


_native = None if _cpu is None else _cpu.layout_reader(torch.Tensor)

layout_key: Callable[..., Hashable] = attributes if _native is None else _native
"""layout_key(*tensors): keys are equal only if the tensors differ in addresses and values alone."""
