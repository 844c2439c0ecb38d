"""FlexAttention, which compiles a kernel for each shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..cases import Case
from ..data import Data, hidden_pairs
from .base import Rival


class Flex(Rival):
    """torch.compile of torch.nn.attention.flex_attention, with a block mask made in advance.

    Varlen is one packed sequence; its mask restricts each query to its own sequence.
    """

    name = "flex"
    compiles = True

    def forward(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """One compiled flex_attention."""
        attention = _compiled_flex(case)
        q, k, v = (x.transpose(0, 1)[None] if case.varlen else x for x in (data.q, data.k, data.v))
        arguments: dict[str, Any] = {
            "block_mask": _block_mask(case, data),
            "enable_gqa": case.heads_q != case.heads_kv,
        }
        if data.bias is not None:
            arguments["score_mod"] = _add(data.bias)
        if case.varlen:
            return lambda: attention(q, k, v, **arguments)[0].transpose(0, 1)
        return lambda: attention(q, k, v, **arguments)


@lru_cache(maxsize=1)
def _compiled_flex(case: Case) -> Callable[..., Tensor]:
    """A new compilation for each case, shared by the copies of its tensors.

    Without the reset, torch reaches its limit of recompilations after a few shapes and then runs uncompiled code.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return compiled


def _add(bias: Tensor) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[i, j]

    return score_mod


def _block_mask(case: Case, data: Data) -> Any:
    """The block mask of causal rule, window, mask and sequence borders. None if everything is visible."""
    from torch.nn.attention.flex_attention import create_block_mask

    device = data.q.device
    if case.varlen:
        return create_block_mask(
            _packed_visibility(case, device), None, None, data.q.shape[0], data.k.shape[0], device=str(device)
        )
    hidden = hidden_pairs(case, case.seqlen_q, case.seqlen_k, data.mask, device)
    if hidden is None:
        return None
    visible = _band(case) if data.mask is None else _lookup(~hidden)
    return create_block_mask(visible, None, None, case.seqlen_q, case.seqlen_k, device=str(device))


MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _band(case: Case) -> MaskMod:
    """Visibility by arithmetic, as FlexAttention's documentation recommends for causal and window."""
    offset = case.seqlen_k - case.seqlen_q if case.causal_alignment == "bottom-right" else 0
    left, right = case.window_bounds

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j >= 0
        if left is not None:
            seen = seen & (i + offset - j <= left)
        if right is not None:
            seen = seen & (j - i - offset <= right)
        return seen

    return visible


def _lookup(table: Tensor) -> MaskMod:
    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return table[i, j]

    return visible


def _packed_visibility(case: Case, device: torch.device) -> MaskMod:
    """Token i sees token j if both belong to one sequence and j is in the band of i."""
    bottom_right = case.causal_alignment == "bottom-right"
    left, right = case.window_bounds
    sequence_q, sequence_k, position_q, position_k = [], [], [], []
    for number, (seqlen_q, seqlen_k) in enumerate(case.sequences):
        sequence_q.append(torch.full((seqlen_q,), number))
        sequence_k.append(torch.full((seqlen_k,), number))
        position_q.append(torch.arange(seqlen_q) + (seqlen_k - seqlen_q if bottom_right else 0))
        position_k.append(torch.arange(seqlen_k))
    of_q, of_k, at_q, at_k = (torch.cat(x).to(device) for x in (sequence_q, sequence_k, position_q, position_k))

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = of_q[i] == of_k[j]
        if left is not None:
            seen = seen & (at_q[i] - at_k[j] <= left)
        if right is not None:
            seen = seen & (at_k[j] - at_q[i] <= right)
        return seen

    return visible
