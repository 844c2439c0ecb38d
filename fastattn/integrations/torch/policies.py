"""Policies of selective checkpoints, which name torch's operators and mean fastattn's too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from ...autograd.call import FORWARD_TENSORS
from ...problem import Options

_KINDS = {
    SDPBackend.FLASH_ATTENTION: "flash_attention",
    SDPBackend.EFFICIENT_ATTENTION: "efficient_attention",
    SDPBackend.CUDNN_ATTENTION: "cudnn_attention",
    SDPBackend.OVERRIDEABLE: "fused_attention_overrideable",  # of devices that other packages add
}


def _operator_of_torch(tensors: Any, rest: Any) -> Any:
    """The fused operator by which torch's function would compute a call, given the arguments of fastattn's operator."""
    q, k, v, mask, bias, *_ = tensors
    kind = "flash_attention_for_cpu"
    if q.device.type != "cpu":
        options = Options(*rest[: len(Options._fields)])
        added = mask if bias is None else bias
        grouped = q.shape[1] != k.shape[1]
        call = (q, k, v, added, options.dropout_p, options.causal and added is None)
        chosen = torch._fused_sdp_choice(*call, scale=options.scale, enable_gqa=grouped)
        kind = _KINDS.get(SDPBackend(chosen), "efficient_attention")
    return getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default


def translate_policies() -> None:
    """Has the policy of a selective checkpoint that is active mean fastattn's operator by torch's.

    Such a policy says by operator what a checkpoint keeps. Written for torch's function it names the operators behind
    that, which a call on fastattn does not reach: all would be computed again, and nobody would be told.
    """
    for level in range(torch._C._len_torch_dispatch_stack()):
        mode: Any = torch._C._get_dispatch_stack_at(level)
        policy = getattr(mode, "policy_fn", None)
        if callable(policy) and not isinstance(policy, _Policy):
            mode.policy_fn = _Policy(policy)


class _Policy:
    """A policy that keeps fastattn's results if the given one would keep them, or those of torch's operator.

    It asks at most once by each of the two names: a policy may count its calls.
    """

    def __init__(self, given: Callable[..., Any]) -> None:
        self._given = given

    def __call__(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
        answer = self._given(context, operator, *args, **kwargs)
        if operator is not torch.ops.fastattn.forward.default or _keeps(answer):
            return answer
        tensors, rest = args[:FORWARD_TENSORS], args[FORWARD_TENSORS:]
        as_torch = self._given(context, _operator_of_torch(tensors, rest), *tensors[:3])
        return as_torch if _keeps(as_torch) else answer


def _keeps(answer: Any) -> bool:
    """Whether a policy's answer, a CheckpointPolicy or a bool, says not to compute the results again."""
    return answer is True or not getattr(answer, "name", "RECOMPUTE").endswith("RECOMPUTE")
