"""The gradient of sinks, which torch computes from numbers per row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SinkRows(NamedTuple):
    """What the gradient depends on, per row: (batch, heads_q, seqlen_q), varlen (heads_q, total_q)."""

    lse: Tensor
    lse_residual: Tensor | None
    delta: Tensor
    dlse: Tensor | None
    saw_nothing: Tensor  # whether the row saw no key


def sinks_grad(sinks: Tensor, rows: SinkRows, *, varlen: bool) -> Tensor:
    """The sum of -share * delta: a sink takes its share of each row, and gives nothing.

    A row that saw nothing else is all sink. Its delta, which no kernel may see, is -dlse.
    """
    exponent, delta = sinks.float().view(-1, 1) - rows.lse, rows.delta
    if rows.lse_residual is not None:
        exponent = exponent - rows.lse_residual.masked_fill(rows.saw_nothing, 0.0)
    share = torch.exp(exponent).masked_fill(rows.lse == -torch.inf, 0.0)
    if rows.dlse is not None:
        delta = torch.where(rows.saw_nothing & (rows.lse != -torch.inf), -rows.dlse.float(), delta)
    total = -(share * delta).sum(-1)
    return (total if varlen else total.sum(0)).to(sinks.dtype)
