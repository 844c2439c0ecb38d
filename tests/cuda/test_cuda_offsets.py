"""Offsets of the CUDA kernels are of 64 bits: tensors in which the next batch entry lies billions of numbers away.

No memory is needed for what lies between. Of a call of two batch entries and two heads only the last head of the last
entry is run, with pointers from which it alone is found at its place: an offset that lost its upper half would lead
out of memory, where the simulator raises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import fastattn
from fastattn.backends import dispatch
from fastattn.backends.native import cuda
from fastattn.backends.native.call import Tensors, addresses, described
from fastattn.problem import Problem

pytest.importorskip("triton", reason="Triton, whose cuobjdump takes the PTX out of the module, is not installed")

from benchmarks.inspect.cuda_simulator import Memory, Simulator, findings

from . import cuda_machines, simulator

pytestmark = [
    pytest.mark.skipif(cuda._cuda is None, reason="fastattn was built without nvcc"),
    cuda_machines.needs_simulator,
    pytest.mark.usefixtures("poisoned_memory"),
]

# Numbers from one batch entry, or head, to the next. Their lower 32 bits are 0; the simulator's addresses, which begin
# near 0, leave room in this direction.
STEPS = (-(2**34), -(2**33))


class Layout(NamedTuple):
    """What a call is described by."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def stride(self) -> tuple[int, ...]:
        return self.strides


class FarBackend(cuda.CudaBackend):
    """Takes calls of one batch entry and head for the last ones of a call of two and two."""

    def _run(self, operation: str, problem: Problem, tensors: Tensors) -> None:
        four = dataclasses.replace(problem, batch=2, heads_q=2, heads_kv=2)
        layouts = {
            name: Layout((2, 2, *x.shape[2:]), (*STEPS, *x.stride()[2:]), x.dtype) for name, x in tensors.items()
        }
        call = described(cuda._cuda.Call, four, layouts)
        size = call.workspace_bytes(operation, addresses(tensors), *self._machine.architecture(problem.device))
        workspace = torch.empty(size, dtype=torch.uint8)
        self._machine.run(problem.device, operation, call, tensors | {"workspace": workspace})


class FarSimulator(Simulator):
    """Runs the last quarter of each launch: the last head of the last batch entry."""

    def run(self, device: torch.device, operation: str, call: Any, tensors: Tensors) -> None:
        memory = Memory(tensors.values())
        begins = addresses(tensors)
        shifted = {n: at - sum(STEPS) * tensors[n].element_size() for n, at in begins.items() if n != "workspace"}
        shifted |= {"workspace": begins["workspace"]} if tensors["workspace"].numel() else {}
        names = {at: name for name, at in shifted.items() if name != "workspace"}
        assert len(names) == len(tensors) - 1
        for name, blocks, threads, shared_bytes, argument in call.plan(operation, shifted, *self.architecture(device)):
            words = np.frombuffer(argument, np.uint64)
            fields: dict[int, Any] = {8 * i: word for i, word in enumerate(words)}
            for offset in cuda._cuda.address_offsets():
                at = int(words[offset // 8])
                if at in names:
                    pointer = memory.pointer(begins[names[at]])
                    fields[offset] = simulator.ptxsim().Ptr(pointer.array, pointer.offset + at - begins[names[at]])
                elif at:
                    fields[offset] = memory.pointer(at)
            struct = simulator.ptxsim().Struct(len(argument), fields)
            last = range(blocks - blocks // 4, blocks)
            counters = self.launch(name, (blocks,), threads, [struct], shared_bytes=shared_bytes, ctas=last)
            self.kernels.append(name)
            self.findings += findings(counters)


def test_offsets(use_backends: Callable[..., None]) -> None:
    """Of everything that is read or written, forward and backward: the same bits as nearby."""
    leaves = [torch.randn(1, 1, n, 64).bfloat16().requires_grad_() for n in (140, 150, 150)]
    dout, dlse = torch.randn(1, 1, 140, 64).bfloat16(), torch.randn(1, 1, 140)
    found = []
    for backend in (FarBackend(FarSimulator()), cuda.CudaBackend(Simulator())):
        use_backends(backend, *dispatch.BACKENDS)
        results = fastattn.attention(*leaves, causal=True, return_lse=True, backend="cuda")
        found.append((*results, *torch.autograd.grad(results, leaves, (dout, dlse))))
        assert len(backend._machine.kernels) == 4
        assert not backend._machine.findings
    for far, near in zip(*found, strict=True):
        assert near.isfinite().all()
        assert torch.equal(far, near)
