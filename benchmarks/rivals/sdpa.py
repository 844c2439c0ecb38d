"""torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..cases import Case
from ..data import Data, hidden_pairs
from .base import PerSequence


class Sdpa(PerSequence):
    """torch.nn.functional.scaled_dot_product_attention, called in the cheapest way for each case.

    * is_causal, if its upper-left alignment is the alignment of the case
    * no mask, if nothing is hidden; otherwise a dense mask, made in advance
    * enable_gqa for grouped heads
    * a loop over the sequences for varlen
    """

    name = "sdpa"

    def dense(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """One scaled_dot_product_attention."""
        q, k, v = data.q, data.k, data.v
        arguments: dict[str, Any] = self._mask(case, data)
        if case.heads_q != case.heads_kv:
            arguments["enable_gqa"] = True
        return lambda: scaled_dot_product_attention(q, k, v, **arguments)

    def _mask(self, case: Case, data: Data) -> dict[str, Any]:
        seqlen_q, seqlen_k = data.q.shape[2], data.k.shape[2]
        aligned = seqlen_q == seqlen_k or case.causal_alignment == "top-left"
        if case.causal and aligned and case.window is None and case.mask == "none":
            return {"is_causal": True}
        hidden = hidden_pairs(case, seqlen_q, seqlen_k, data.mask, data.q.device)
        if data.bias is not None:
            return {"attn_mask": data.bias if hidden is None else data.bias.masked_fill(hidden, -torch.inf)}
        return {} if hidden is None else {"attn_mask": ~hidden}
