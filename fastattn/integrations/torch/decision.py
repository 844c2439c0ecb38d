"""Whether fastattn computes a call of torch's function, and if not, why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from ... import sdpa
from ...autograd import is_plain
from ...autograd.autocast import autocast
from ...backends.dispatch import choose, choose_cached
from ...problem import Inputs, Options, Problem, describe

OWN_TYPES = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)  # the last two are tracers' stand-ins


@dataclass(frozen=True)
class Call:
    """A call in fastattn's terms."""

    translated: sdpa.SdpaCall
    problem: Problem
    inputs: Inputs


def understand(*args: Any, **kwargs: Any) -> Call | str:
    """The call in fastattn's terms, or a sentence that says why it has to be torch's."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) and type(x) not in OWN_TYPES:
            return f"one of its tensors is a {type(x).__name__}, which has a way of its own with torch's functions."
    if forward_ad._current_level >= 0:
        return "derivatives in forward mode are recorded, for which fastattn has no formula."
    try:
        call = _translate(*args, **kwargs)
        o = call.options
        inputs = Inputs(call.q, call.k, call.v, o["mask"], o["bias"])
        options = Options(o["causal"], None, None, o["causal_alignment"], None, o["scale"], o["dropout_p"])
        problem = describe("dense", inputs, options, cached=is_plain(call.q, call.k, call.v))
    except (TypeError, ValueError) as refusal:
        return f"fastattn does not take it: {refusal}."
    return Call(call, problem, inputs)


def _translate(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> sdpa.SdpaCall:
    return sdpa.translate(*autocast(query, key, value), *args, **kwargs)


def why_torch(call: Call) -> str | None:
    """None if fastattn should compute the call, else a sentence that says why not."""
    decide = choose_cached if is_plain(*call.inputs[:3]) else choose
    if decide(call.problem, None).name == "reference":
        return "fastattn has no fused kernel for it here, only its reference."
    return None
