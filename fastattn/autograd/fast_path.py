"""The shortest way for the commonest calls: q, k and v alone, nothing looking on.

Describing a call takes longer than a small one takes to compute. The first call of a kind is described, validated and
given to a backend as any other; if that backend can `prepare` it, calls of the same layouts and options go straight
to what it prepared, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import dispatch
from ..backends.layout_key import NO_LAYOUT, attributes, layout_key
from ..problem import Inputs, Options, describe, split_window
from .call import Call
from .functions import Attention, is_plain

_MOST = 4096  # kinds that are kept
_kinds: dict[Any, Call | None] = {}  # calls that differ in nothing but the values of their tensors
_UNKNOWN: Any = object()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: Any,
    causal_alignment: str,
    softcap: float | None,
    scale: float | None,
    backend: str | None,
) -> Tensor | None:
    """The output of this call; None if it has to go the ordinary way, to be refused there perhaps."""
    if not is_plain(q, k, v) or torch._C._is_any_autocast_enabled() or forward_ad._current_level >= 0:
        return None
    try:
        # Types are part of the key, as 1 == True == 1.0 and not all of them are accepted.
        key = (
            *(layout_key(q, k, v), causal, window, causal_alignment, softcap, scale, backend),
            *(type(causal), type(softcap), type(scale)),
            None if window is None else tuple(map(type, window)),
        )
        kind = _kinds.get(key, _UNKNOWN)
    except NO_LAYOUT:  # or an option of a wrong type: both will be refused
        return None
    if kind is _UNKNOWN:
        if len(_kinds) >= _MOST:
            _kinds.clear()
        _kinds[key] = kind = _prepare(q, k, v, causal, window, causal_alignment, softcap, scale, backend)
    if kind is None:
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _record(q, k, v, [], kind)
    return kind.prepared.infer(q, k, v)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: Any,
    causal_alignment: str,
    softcap: float | None,
    scale: float | None,
    name: str | None,
) -> Call | None:
    inputs = Inputs(q, k, v)
    try:
        options = Options(causal, *split_window(window), causal_alignment, softcap, scale)
        problem = describe("dense", inputs, options)
        backend = dispatch.choose(problem, name)
    except (TypeError, ValueError):
        return None
    prepared = backend.prepare(problem, inputs)
    return None if prepared is None else Call(options, name, True, prepared)


# The way to Attention.forward: what `apply` comes to where no function transform is active. Looking for one, and for
# tensors that one left behind, takes it half of its time. The native reader has refused those.
_record = Attention.apply if layout_key is attributes else super(torch.autograd.Function, Attention).apply
