"""The Triton kernels (kernels/): every feature, on every GPU that Triton compiles for, and in its interpreter.

A call becomes launches of kernels (triton_launches.py), which a machine runs (kernels/machine.py).
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ...kernels import config
from ...kernels.machine import Machine
from ...problem import Inputs, Problem
from ..base import Grads, Needs, Results, empty_results

_LARGEST_HEAD_DIM = 512
_LONGEST = 2**28  # sums of two positions and a window stay within 32 bits


class TritonBackend:
    """Fused kernels, compiled at the first call of a kind for the GPU at hand."""

    name = "triton"

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def why_unavailable(self) -> str | None:
        """See `Backend.why_unavailable`."""
        return self._machine.why_unavailable() or _why_not_importable()

    def why_not(self, problem: Problem) -> str | None:
        """See `Backend.why_not`."""
        p = problem
        if p.dtype == torch.float64:
            return "its dtype is torch.float64, and these kernels compute in float32."
        for name in ("head_dim", "head_dim_v"):
            if getattr(p, name) > _LARGEST_HEAD_DIM:
                return f"{name} is {getattr(p, name)}, and this backend takes at most {_LARGEST_HEAD_DIM}."
        for name in ("seqlen_q", "seqlen_k"):
            if getattr(p, name) >= _LONGEST:
                return f"{name} is {getattr(p, name)}, and this backend takes less than {_LONGEST}."
        if reason := self._machine.why_not(p.device, p.dtype):
            return reason
        shape = _launches().shape_of(p, packed=False)
        return config.why_not(shape, self._machine.architecture(p.device))

    def remarks(self, problem: Problem, inputs: Inputs) -> tuple[str, ...]:
        """See `Backend.remarks`; any layout will do."""
        return ()

    def prepare(self, problem: Problem, inputs: Inputs) -> None:
        """Triton looks at the arguments of each launch itself."""

    def forward(self, problem: Problem, inputs: Inputs, for_backward: bool) -> Results:
        """See `Backend.forward`."""
        results = empty_results(problem, inputs.q, for_backward)
        launching = _launches()
        launches = launching.forward_launches(problem, launching.in_memory(inputs), self._machine, results)
        self._machine.run(problem.device, launches)
        return results

    def backward(
        self, problem: Problem, inputs: Inputs, results: Results, dout: Tensor, dlse: Tensor | None, needs: Needs
    ) -> Grads:
        """See `Backend.backward`."""
        launching = _launches()
        given = launching.in_memory(inputs)
        work = launching.Gradients(problem, given, self._machine, results, dout, dlse, needs)
        self._machine.run(problem.device, work.launches)
        return work.results()

    def decode(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See `Backend.decode`."""
        launching = _launches()
        p, x = problem, launching.in_memory(inputs)
        results = empty_results(p, x.q, for_backward=False)
        launches = launching.forward_launches(p, x, self._machine, results)
        if x.k_new is None:
            self._machine.run(p.device, launches)
            return results.out, results.lse
        self._machine.run(p.device, [launching.append_launch(p, x, self._machine), *launches])
        for cache, used in ((inputs.k, x.k), (inputs.v, x.v)):
            if used is not cache:  # a copy was written
                cache.copy_(used)
            elif not cache.is_inference():
                torch.autograd.graph.increment_version(cache)
        return results.out, results.lse


def _launches() -> Any:
    """The module that makes launches. It imports Triton, which calls on a CPU should not have to wait for."""
    return import_module(".launches", __package__)


@lru_cache
def _why_not_importable() -> str | None:
    try:
        _launches()
    except Exception as error:  # whatever a broken installation throws must not stop the other backends
        return f"Triton could not be imported ({error}); install it with pip install triton."
    return None
