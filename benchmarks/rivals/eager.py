"""Attention as people write it by hand: matmul, softmax, matmul."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..cases import Case
from ..data import Data, hidden_pairs
from ..machine import free_memory
from .base import PerSequence


class Eager(PerSequence):
    """matmul, softmax, matmul, in the dtype of the inputs."""

    name = "eager"

    def why_not(self, case: Case, data: Data) -> str | None:
        """Refuses a case that does not fit into memory."""
        scores = case.batch * case.heads_q * case.seqlen_q * case.seqlen_k * case.torch_dtype.itemsize
        # Scores, probabilities and one temporary; training holds their gradients as well.
        needed, free = scores * (6 if case.train else 3), free_memory(data.q.device)
        if free is not None and needed > free:
            return f"it would need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return None

    def dense(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """One `eager_attention`."""
        hidden = hidden_pairs(case, data.q.shape[2], data.k.shape[2], data.mask, data.q.device)
        return lambda: eager_attention(data.q, data.k, data.v, hidden, data.bias)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, bias: Tensor | None) -> Tensor:
    """Plain attention, each step rounded to the dtype of q; hidden and bias broadcast to the scores."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v
