"""What keeps the fused kernel of torch.nn.TransformerEncoderLayer away from our attention."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn


class NoFastPath(nn.Module):
    """A child of MultiheadAttention that is never called, and whose hook never runs.

    In evaluation torch.nn.TransformerEncoderLayer computes attention by one fused kernel, from the weights of
    `self_attn` and without calling it: no window, no ALiBi, none of our kernels. It does not if a module inside has a
    hook, which would not run then. A hook on the attention itself would cost time in every call. The hook is part of
    the class, so code that clears the hooks of a model does not reach it.
    """

    __jit_unused_properties__ = ("_forward_pre_hooks",)

    @property  # type: ignore[override]
    def _forward_pre_hooks(self) -> OrderedDict[int, Any]:
        return OrderedDict({0: _no_op})

    @_forward_pre_hooks.setter
    def _forward_pre_hooks(self, value: Any) -> None:
        """Ignored: of torch.nn.Module.__init__, and of code that clears hooks."""

    def forward(self, x: Tensor) -> Tensor:
        """For TorchScript, which compiles children and their hooks whether they are called or not."""
        return x


def _no_op(self: NoFastPath, input: tuple[Tensor]) -> None:
    """Never called."""
