"""Every barrier and every wait in three kernels of sm_80 is needed, and leaving it out would not go unnoticed.

Each is taken out of the PTX in turn, and what is left runs until a case complains: the simulator with a finding, or
numbers that are wrong. (Threads run in lockstep there, so numbers alone would miss most. Barriers of a single warp it
takes for granted; they are left alone.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastattn.backends import dispatch
from fastattn.backends.native import cuda

from .. import cases
from ..cases import Case
from ..tolerance import assert_close

pytest.importorskip("triton", reason="Triton, whose cuobjdump takes the PTX out of the module, is not installed")

from benchmarks.inspect import cuda_simulator

from . import cuda_machines, simulator

pytestmark = [
    pytest.mark.skipif(cuda._cuda is None, reason="fastattn was built without nvcc"),
    cuda_machines.needs_simulator,
    pytest.mark.usefixtures("poisoned_memory"),
]

KERNELS = {
    "fastattn_sm80_forward_bf16_d64": ("out", "lse"),
    "fastattn_sm80_bwd_dq_bf16_d64": ("dq",),
    "fastattn_sm80_bwd_dkdv_bf16_d64": ("dk", "dv"),
}
"""With the tensors that each writes."""

BF16 = torch.bfloat16
SITE = re.compile(r"\s*(bar\.sync|barrier\.|cp\.async\.wait)")


def _case(seqlen_q: int, seqlen_k: int, **options: Any) -> Case:
    name = f"{seqlen_q} over {seqlen_k} {options}"
    return Case(
        name,
        1,
        **{"heads_q": 1, "heads_kv": 1, "head_dim": 64, "head_dim_v": 64, **options},
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
    )


# Blocks are of 64 keys, 32 keys and 64 queries: an even and an odd number of each, seen whole, in part and not at all.
CASES = (
    _case(64, 64),
    _case(128, 128),
    _case(192, 192),
    _case(160, 160, causal=True, window=(40, None)),
    _case(64, 128, heads_q=3),
    _case(40, 140, causal=True, causal_alignment="top-left"),
)


class Recorder(cuda_simulator.Simulator):
    """Keeps how one kernel was launched."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel

    def launch(self, name: str, *arguments: Any, **options: Any) -> Any:
        if name == self.kernel:
            self.arguments, self.options, self.written = arguments, options, self.tensors
        return super().launch(name, *arguments, **options)


class Launch:
    """A kernel's part in a case, to be done again by others."""

    def __init__(self, kernel: str, case: Case, use_backends: Callable[..., None]) -> None:
        self.machine = Recorder(kernel)
        use_backends(cuda.CudaBackend(self.machine), *dispatch.BACKENDS)
        call, want = cases.build(case, BF16), cases.expected(case, BF16)
        call.requires_grad()
        results = call.run(return_lse=True, backend="cuda")
        torch.autograd.backward(results, (want.dout, want.dlse))
        exact = {"out": want.exact.out, "lse": want.exact.lse, **{f"d{n}": x for n, x in want.exact.grads.items()}}
        eager = {"out": want.eager_out, "lse": want.eager_lse, **{f"d{n}": x for n, x in want.eager_grads.items()}}
        self.kernel = kernel
        self.outputs = [
            (name, self.machine.written[name].detach(), exact[name], eager[name]) for name in KERNELS[kernel]
        ]

    def complaint(self, module: Any) -> str | None:
        """What is wrong with a kernel that does the same launch."""
        for _, output, _, _ in self.outputs:
            output.fill_(torch.nan)
        try:
            counters = module.launch(self.kernel, *self.machine.arguments, **self.machine.options)
            for found in cuda_simulator.findings(counters):
                return str(found)
            for name, output, exact, eager in self.outputs:
                assert_close(name, output, exact, eager, output.dtype)
        except (simulator.ptxsim().SimError, AssertionError) as error:
            return str(error)
        return None


BF16 = torch.bfloat16


def mutants(ptx: str) -> Iterator[tuple[str, str]]:
    """The kernel without one of its barriers or waits each, and the place, with what stands around it."""
    lines = ptx.splitlines()
    for i, line in enumerate(lines):
        if SITE.match(line):
            around = "\n".join(f"{'>' if j == i else ' '} {j + 1}: {lines[j].strip()}" for j in range(i - 4, i + 5))
            yield "\n".join(lines[:i] + lines[i + 1 :]) + "\n", around


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_mutant_survives(kernel: str, use_backends: Callable[..., None]) -> None:
    launches = [Launch(kernel, case, use_backends) for case in CASES]
    load, ptx = simulator.ptxsim().load_ptx, cuda_simulator.ptx(kernel, 80)
    whole = load(ptx)
    assert [launch.complaint(whole) for launch in launches] == [None] * len(CASES)
    survivors, count = [], 0
    for mutant, around in mutants(ptx):
        module = load(mutant)
        count += 1
        if not any(launch.complaint(module) for launch in launches):
            survivors.append(around)
    assert count >= 6
    assert not survivors, f"{len(survivors)} are not missed when they are left out:\n\n" + "\n\n".join(survivors)
