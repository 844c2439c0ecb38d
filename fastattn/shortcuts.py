"""The shortest way for the commonest call: q, k and v alone, no gradient, nothing looking on.

Describing a call takes longer than a small one takes to compute. The first call of a kind is described, validated and
given to a backend as any other; if that backend can `prepare` it, calls of the same shapes, strides, dtypes, devices
and options go straight to the prepared function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch
from .autograd import is_plain
from .problem import Inputs, Options, describe, split_window

Prepared = Callable[[Tensor, Tensor, Tensor], Tensor]

_MOST = 4096  # prepared calls that are kept
_prepared: dict[Any, Prepared | None] = {}


def find(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: Any,
    causal_alignment: str,
    softcap: float | None,
    scale: float | None,
    backend: str | None,
) -> Prepared | None:
    """The prepared function for this call; None if it has to go the ordinary way, to be refused there perhaps."""
    if not is_plain(q, k, v) or torch._C._is_any_autocast_enabled() or forward_ad._current_level >= 0:
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    options = (causal, window, causal_alignment, softcap, scale, backend)
    try:
        # Types are part of the key, as 1 == True == 1.0 and not all of them are accepted.
        key = (
            *(q.shape, q.stride(), q.dtype, q.device, q.is_neg()),
            *(k.shape, k.stride(), k.dtype, k.device, k.is_neg()),
            *(v.shape, v.stride(), v.dtype, v.device, v.is_neg()),
            *(options, type(causal), type(softcap), type(scale), *map(type, () if window is None else window)),
        )
        return _prepared[key]
    except KeyError:
        if len(_prepared) >= _MOST:
            _prepared.clear()
        _prepared[key] = prepared = _prepare(q, k, v, *options)
        return prepared
    except (TypeError, RuntimeError):  # no strides, or an option of a wrong type: both will be refused
        return None


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
) -> Prepared | None:
    inputs = Inputs(q, k, v)
    try:
        options = Options(causal, *split_window(window), causal_alignment, softcap, scale)
        problem = describe("dense", inputs, options)
        backend = dispatch.choose(problem, name)
    except (TypeError, ValueError):
        return None
    return backend.prepare(problem, inputs)
