"""What keeps the fused kernel of torch.nn.TransformerEncoderLayer away from our attention."""

from __future__ import annotations

from torch import Tensor, nn


class NoFastPath(nn.Module):
    """A child of MultiheadAttention that is never called, and whose hook never runs.

    In evaluation torch.nn.TransformerEncoderLayer computes attention by one fused kernel, from the weights of
    `self_attn` and without calling it: no window, no ALiBi, none of our kernels. It does not if a module inside has a
    hook, which would not run then. A hook on the attention itself would cost time in every call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(_no_op)

    def forward(self, x: Tensor) -> Tensor:
        """For TorchScript, which compiles children and their hooks whether they are called or not."""
        return x


def _no_op(self: NoFastPath, input: tuple[Tensor]) -> None:
    """Never called."""
