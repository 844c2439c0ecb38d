"""What the Triton backend launches for a call: kernels, grids, arguments and workspaces. Imports Triton."""

from .append_kv import append_kv_launch
from .arguments import kernel_inputs
from .backward import BackwardPass
from .forward import forward_launches

__all__ = ["BackwardPass", "append_kv_launch", "forward_launches", "kernel_inputs"]
