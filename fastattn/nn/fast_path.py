"""What keeps the fused kernel of torch.nn.TransformerEncoderLayer away from our attention."""

from __future__ import annotations

from typing import Any

from torch import nn


class NoFastPath(nn.Module):
    """A child of MultiheadAttention that is never called, and whose hook never runs.

    In evaluation torch.nn.TransformerEncoderLayer computes attention by one fused kernel, from the weights of
    `self_attn` and without calling it: no window, no ALiBi, none of our kernels. It does not if a module inside has a
    hook, which would not run then. A hook on the attention itself would cost time in every call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(_no_op)


def _no_op(module: nn.Module, args: Any) -> None:
    """Never called."""
