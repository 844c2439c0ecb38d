"""The gradient of a bias: partial sums that a kernel writes, and their total."""

from __future__ import annotations

import torch
from torch import Tensor

from ....kernels import arguments as args
from ....kernels import config
from ....problem import Problem


class PartialBiasGrad:
    """Memory for the partial sums, the grid that fills it, and the arguments of kernels/bwd_dbias.py about them.

    A bias with a row for each query and a column for each key is summed over the rest by the kernel: partial sums would
    outgrow it. Any other is much smaller than the scores, and gets a partial sum per sequence and head.
    """

    def __init__(self, p: Problem, bias: Tensor, chosen: config.Config) -> None:
        batches, heads, rows, columns = (1,) * (4 - bias.ndim) + tuple(bias.shape)
        if rows == 1 or columns == 1:
            batches, heads = p.batch, p.heads_q
        tiles_m = -(-rows // chosen.block_m) if rows > 1 else 1
        if rows == columns == 1:
            tiles_m = -(-p.seqlen_q // chosen.block_m)
        tiles_n = -(-columns // chosen.block_n) if columns > 1 else 1
        height = tiles_m * chosen.block_m if rows > 1 else tiles_m
        width = tiles_n * chosen.block_n if columns > 1 else 1
        self._sums = torch.zeros((batches, heads, height, width), dtype=torch.float32, device=p.device)
        empty = 0 in (p.batch, p.heads_q, p.seqlen_q, p.seqlen_k)
        self.grid = 0 if empty else batches * heads * tiles_m * tiles_n
        self.arguments = {
            "dbias": args.Array(self._sums, *self._sums.stride()),
            "batches": batches,
            "heads_out": heads,
            "tiles_m": tiles_m,
            "tiles_n": tiles_n,
            "ALL_BATCHES": batches == 1 and p.batch > 1,
            "ALL_HEADS": heads == 1 and p.heads_q > 1,
            "ALL_ROWS": rows == 1 and columns > 1,
            "SUM_ROWS": rows == 1,
            "SUM_COLUMNS": columns == 1,
        }

    def total(self, bias: Tensor) -> Tensor:
        """The partial sums over what the bias broadcasts, in its shape and dtype."""
        shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
        over = [d for d, size in enumerate(shape) if size == 1 and self._sums.shape[d] != 1]
        total = self._sums.sum(over, keepdim=True) if over else self._sums
        return total[tuple(slice(size) for size in shape)].to(bias.dtype).reshape(bias.shape)
