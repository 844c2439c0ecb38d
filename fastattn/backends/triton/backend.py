"""The Triton kernels (kernels/): every feature, on every GPU that Triton compiles for, and in its interpreter.

A call becomes launches of kernels (launches/), which a machine runs (kernels/machine.py).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...kernels import config
from ...problem import Inputs, Problem
from ..base import Backend, Grads, Needs, Results, empty_results, finish_append, why_too_large, why_too_long
from .machine import Machine
from .shape import shape_of

# `launches` imports Triton, for which calls on a CPU should not have to wait. So it is imported where it is used.

_MAX_HEAD_DIM = 512


class TritonBackend(Backend):
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
        if reason := why_too_large(p, _MAX_HEAD_DIM) or why_too_long(p) or self._machine.why_not(p.device, p.dtype):
            return reason
        return config.why_not(shape_of(p, packed=False), self._machine.architecture(p.device))

    def forward(self, problem: Problem, inputs: Inputs, for_backward: bool) -> Results:
        """See `Backend.forward`."""
        from . import launches

        results = empty_results(problem, inputs.q, for_backward)
        given = launches.kernel_inputs(inputs)
        self._machine.run(problem.device, launches.forward_launches(problem, given, self._machine, results))
        return results

    def backward(
        self, problem: Problem, inputs: Inputs, results: Results, dout: Tensor, dlse: Tensor | None, needs: Needs
    ) -> Grads:
        """See `Backend.backward`."""
        from . import launches

        given = launches.kernel_inputs(inputs)
        work = launches.BackwardPass(problem, given, self._machine, results, dout, dlse, needs)
        self._machine.run(problem.device, work.launches)
        return work.grads()

    def decode(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See `Backend.decode`."""
        from . import launches

        p, x = problem, launches.kernel_inputs(inputs)
        results = empty_results(p, x.q, for_backward=False)
        planned = launches.forward_launches(p, x, self._machine, results)
        if x.k_new is not None:
            planned = [launches.append_kv_launch(p, x, self._machine), *planned]
        self._machine.run(p.device, planned)
        finish_append(inputs, x.k, x.v)
        return results.out, results.lse


@lru_cache
def _why_not_importable() -> str | None:
    try:
        _import_launches()
    except Exception as error:  # whatever a broken installation throws must not stop the other backends
        return f"Triton could not be imported ({error}); install it with pip install triton."
    return None


def _import_launches() -> None:
    from . import launches as launches
