"""The machine code for each kind of GPU: spills and shared memory; and kernels as only later GPUs have them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastattn.backends import Needs, dispatch
from fastattn.backends.native import cuda
from fastattn.backends.native.call import Tensors, addresses
from fastattn.problem import Inputs, Options, describe

from ..cases import GQA, Case

pytest.importorskip("triton", reason="Triton, whose cuobjdump takes the code out of the module, is not installed")

from benchmarks.inspect import cuda_module, cuda_simulator
from benchmarks.inspect.cuda_simulator import Simulator
from native_build import CUDA_ARCHITECTURES, HEAD_DIMS, HEAD_DIMS_75

from . import cuda_machines
from .test_cuda_gradients import check
from .test_cuda_kernels import BF16, FP16, _case, _dims

pytestmark = pytest.mark.skipif(cuda._cuda is None, reason="fastattn was built without nvcc")

SHARED_BYTES = {"75": 64 * 1024}
"""What a block may have; on other GPUs 99 KiB, the least that any later than 8.0 has."""


@pytest.fixture(params=CUDA_ARCHITECTURES)
def usage(request: pytest.FixtureRequest) -> dict[str, cuda_module.Usage]:
    """What the kernels that a GPU runs take there: on 7.5 those of sm75, on others those of sm80, and those of smxx."""
    found = cuda_module.usage(f"sm_{request.param}")
    if not found:
        asked = os.environ.get("FASTATTN_CUDA_ARCHITECTURES", "").split(",")
        assert request.param not in asked, "machine code was asked for when the module was built"
        pytest.skip(f"the module has no machine code for sm_{request.param} (FASTATTN_CUDA_ARCHITECTURES)")
    return {name: x for name, x in found.items() if ("sm75" in name) == (request.param == "75") or "_sm" not in name}


def test_nothing_is_spilled(usage: dict[str, cuda_module.Usage]) -> None:
    turing = any("sm75" in name for name in usage)
    assert usage.keys() == {
        name for name in cuda_simulator.kernels(80) if ("sm75" in name) == turing or "_sm" not in name
    }
    assert {name: x.stack for name, x in usage.items() if x.stack} == {}


class Planner(Simulator):
    """Runs nothing; notes how much dynamic shared memory kernels would be launched with."""

    def run(self, device: torch.device, operation: str, call: Any, tensors: Tensors) -> None:
        plan = call.plan(operation, addresses(tensors), *self.architecture(device))
        self.shared_bytes |= {name: shared for name, _, _, shared, _ in plan}


def test_shared_memory_fits(usage: dict[str, cuda_module.Usage], request: pytest.FixtureRequest) -> None:
    """Static and dynamic together, in every forward and backward kernel, and those of a few queries."""
    architecture = request.node.callspec.params["usage"]
    machine = Planner(int(architecture))
    backend = cuda.CudaBackend(machine)
    for head_dim in HEAD_DIMS_75 if architecture == "75" else HEAD_DIMS:
        for dtype in (FP16,) if architecture == "75" else (FP16, BF16):
            for softcap in (None, 1.0):
                for seqlen_q in (4, 64):
                    inputs = Inputs(*(torch.zeros(1, 1, n, head_dim, dtype=dtype) for n in (seqlen_q, 64, 64)))
                    problem = describe("dense", inputs, Options(softcap=softcap))
                    results = backend.forward(problem, inputs, for_backward=True)
                    needs = Needs(True, True, True, False, False)
                    backend.backward(problem, inputs, results, results.out, None, needs)
    with_tensor_cores = {name for name in usage if re.search(r"_d[0-9]+$", name)}
    assert with_tensor_cores <= machine.shared_bytes.keys()
    limit = SHARED_BYTES.get(architecture, 99 * 1024)
    found = {name: usage[name].shared + dynamic for name, dynamic in machine.shared_bytes.items()}
    assert {name: total for name, total in found.items() if total > limit} == {}


LATER: tuple[tuple[Case, torch.dtype], ...] = (
    (_case("forward", causal=True, **_dims(128)), BF16),
    (_case("forward, whole blocks", seqlen_q=128, seqlen_k=192, **_dims(128)), FP16),
    (_case("gradients of keys", heads_q=4), BF16),
    (_case("gradients of keys, causal", causal=True, heads_q=1, heads_kv=1), FP16),
    (_case("gradients, 256", causal=True, seqlen_q=70, seqlen_k=100, **_dims(256)), BF16),
    (_case("head_dim 32", causal=True, **_dims(32)), BF16),
    (_case("head_dim 32, softcap", softcap=1.5, **_dims(32)), FP16),
    (_case("head_dim 192, softcap", softcap=1.5, seqlen_q=70, **_dims(192)), BF16),
    (_case("window, ALiBi", window=(40, 10), alibi="h", **_dims(64)), BF16),
    (Case("varlen", lengths=((7, 19), (130, 150), (0, 5), (65, 64)), causal=True, **GQA), BF16),
)
"""Kernels that differ on compute capability 9.0 and up, see ArchTraits in common/arch.h, and some that should not."""


@cuda_machines.needs_simulator
@pytest.mark.parametrize("run", LATER, ids=lambda run: run[0].name)
def test_kernels_short_of_registers(run: tuple[Case, torch.dtype], use_backends: Callable[..., None]) -> None:
    machine = Simulator(90)
    kernels = cuda_simulator.kernels(90)
    if not any(unit.target == 90 for unit in kernels.values()):
        assert not cuda_module.usage("sm_90"), "there is machine code for 9.0, and no PTX"
        pytest.skip("the module was built for no GPU of 9.0 or later (FASTATTN_CUDA_ARCHITECTURES)")
    use_backends(cuda.CudaBackend(machine), *dispatch.BACKENDS)
    check(*run, machine)
