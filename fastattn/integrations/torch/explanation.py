"""Where a call of torch's function runs, for people."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...backends.dispatch import Report, explain_choice
from .decision import understand, why_torch
from .switch import is_active


@dataclass(frozen=True)
class Explanation:
    """Where a call of scaled_dot_product_attention runs under `use`. str() of it is meant for people.

    runs_on: "fastattn" or "torch". reason: why torch; None for fastattn. report: fastattn's own choice of a backend,
    as of `fastattn.explain`; None where it did not come to that. active: whether `use` is on in this thread.
    """

    runs_on: str
    reason: str | None
    report: Report | None
    active: bool

    def __str__(self) -> str:
        when = "runs" if self.active else "would run"
        lines = [f"This call of scaled_dot_product_attention {when} on {self.runs_on}."]
        if not self.active:
            lines.append("  note: fastattn.integrations.torch.use() is not active in this thread, so torch runs it.")
        if self.reason is not None:
            lines.append(f"  not fastattn: {self.reason}")
        return "\n".join(lines + ([] if self.report is None else [str(self.report)]))


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Explanation:
    """Where this call of scaled_dot_product_attention runs under `use`, and why.

    Takes the arguments of torch's function; computes nothing. print() the result.
    """
    call = understand(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if isinstance(call, str):
        return Explanation("torch", call, None, is_active())
    reason = why_torch(call)
    report = explain_choice(call.problem, call.inputs, None)
    return Explanation("fastattn" if reason is None else "torch", reason, report, is_active())
