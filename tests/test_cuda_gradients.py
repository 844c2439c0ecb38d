"""Gradients of the CUDA C++ kernels as built, executed in a simulator of PTX and on a GPU; see test_cuda_kernels.py."""

from __future__ import annotations

import pytest
import torch

from fastattn.backends import cuda

from . import cases
from .cases import GQA, Case
from .tolerance import assert_close

pytest.importorskip("triton", reason="Triton, whose cuobjdump takes the PTX out of the module, is not installed")

from benchmarks.cuda_simulator import Simulator

from .cuda_machines import Hardware
from .test_cuda_kernels import BF16, FP16, SIZES, _case, _dims

pytestmark = [
    pytest.mark.skipif(cuda._cuda is None, reason="fastattn was built without nvcc"),
    pytest.mark.usefixtures("poisoned_memory"),
]

CAPABILITY = 80
ALL_DIMS = (8, 32, 64, 96, 128, 192, 256)

CASES: tuple[tuple[Case, torch.dtype], ...] = (
    *((_case(f"queries {n}", seqlen_q=n, causal=True, heads_q=1, heads_kv=1), BF16) for n in SIZES),
    *((_case(f"keys {n}", seqlen_k=n, heads_q=1, heads_kv=1), BF16) for n in SIZES),
    *((_case(f"square {n}", seqlen_q=n, seqlen_k=n, causal=True, **_dims(128)), BF16) for n in (1, 63, 64, 127, 257)),
    *((_case(f"head_dim {d}", causal=True, seqlen_q=80, **_dims(d)), BF16) for d in ALL_DIMS),
    *((_case(f"head_dim {d}, float16", seqlen_q=80, **_dims(d)), FP16) for d in ALL_DIMS),
    *((_case(f"head_dim {d}, softcap", softcap=1.5, causal=True, seqlen_q=80, **_dims(d)), BF16) for d in ALL_DIMS[1:]),
    (_case("head_dim_v larger", **_dims(40, 128)), BF16),
    (_case("head_dim_v smaller", **_dims(128, 24)), BF16),
    (_case("causal top-left", causal=True, causal_alignment="top-left"), BF16),
    (_case("more queries than keys", seqlen_q=300, seqlen_k=100, causal=True), BF16),
    (_case("window", window=(70, 20)), BF16),
    (_case("window left", window=(30, None)), BF16),
    (_case("window right", window=(None, 5)), BF16),
    (_case("window causal, long", window=(33, None), causal=True, seqlen_q=300, seqlen_k=300), BF16),
    (_case("alibi", alibi="h", causal=True), BF16),
    (_case("alibi and softcap, float16", alibi="h", softcap=2.0), FP16),
    (_case("sinks", sinks=True, causal=True, batch=2), BF16),
    (_case("sinks without keys", sinks=True, seqlen_q=201, seqlen_k=50, causal=True), BF16),
    (_case("kv_lengths", batch=2, kv_lengths=(130, 0), causal=True), BF16),
    (_case("negative scale", scale=-0.2), BF16),
    (_case("GQA", **{**GQA, "head_dim": 64, "head_dim_v": 64}, causal=True), BF16),
    (_case("head_dim not innermost", layout="bhds"), BF16),
    (_case("scattered", layout="scattered", seqlen_q=70, seqlen_k=70), BF16),
    (Case("varlen", lengths=((7, 19), (130, 150), (0, 5), (65, 64)), causal=True, heads_q=2, heads_kv=2), BF16),
    (Case("varlen, window", lengths=((7, 19), (130, 150), (64, 0), (65, 64)), window=(20, 0), **GQA), BF16),
    (Case("varlen, spare", lengths=((7, 7), (200, 200)), spare=(5, 5), alibi="bh", causal=True, sinks=True), BF16),
)


@pytest.mark.parametrize("run", CASES, ids=lambda run: f"{run[0]}-{str(run[1]).removeprefix('torch.')}")
def test_gradients(run: tuple[Case, torch.dtype], machine: Simulator | Hardware) -> None:
    case, dtype = run
    call, want = cases.build(case, dtype, machine.device), cases.expected(case, dtype)
    leaves = call.requires_grad()
    out, lse = call.run(return_lse=True, backend="cuda")
    torch.autograd.backward((out, lse), (want.dout.to(out.device), want.dlse.to(out.device)))
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        term = want.exact.terms.get(name, 0.0)
        assert_close(f"d{name}", leaf.grad, want.exact.grads[name], want.eager_grads[name], dtype, largest_term=term)
    assert any("gradient_of_queries" in name for name in machine.kernels)
    assert any("gradient_of_keys" in name for name in machine.kernels)
    assert not machine.findings
