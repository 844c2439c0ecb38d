"""The CUDA C++ kernels for compute capability 7.5 as built: see test_cuda_kernels.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from fastattn.backends import dispatch
from fastattn.backends.native import cuda
from fastattn.problem import values

from .. import cases
from ..cases import GQA, Case
from ..tolerance import assert_close

pytest.importorskip("triton", reason="Triton, whose cuobjdump takes the PTX out of the module, is not installed")

from benchmarks.inspect import cuda_module
from benchmarks.inspect.cuda_simulator import Simulator

from . import cuda_machines
from .cuda_machines import Hardware

pytestmark = [
    pytest.mark.skipif(cuda._cuda is None, reason="fastattn was built without nvcc"),
    pytest.mark.usefixtures("poisoned_memory"),
]

CAPABILITY = 75
FP16 = torch.float16


def _case(name: str, head_dim: int = 64, **options: Any) -> Case:
    base: dict[str, Any] = {"batch": 1, "heads_q": 1, "heads_kv": 1, "head_dim": head_dim, "head_dim_v": head_dim}
    return Case(name, **{**base, "seqlen_q": 100, "seqlen_k": 150, **options})


CASES = (
    *(_case(f"queries {n}", seqlen_q=n, causal=True) for n in (1, 65, 129)),
    *(_case(f"keys {n}", seqlen_k=n) for n in (1, 47, 48, 49, 200)),  # the blocks of keys are of 48
    *(_case(f"square {n}", 128, seqlen_q=n, seqlen_k=n, causal=True) for n in (15, 16, 64, 150)),  # of 16
    *(_case(f"head_dim {d}", d, causal=True) for d in (8, 40, 72, 96)),
    *(_case(f"head_dim {d}, softcap", d, softcap=1.5, causal=True) for d in (64, 104, 128)),
    _case("head_dim_v larger", head_dim=40, head_dim_v=128),
    _case("head_dim_v smaller", head_dim=128, head_dim_v=24),
    *(_case(f"causal top-left, head_dim {d}", d, causal=True, causal_alignment="top-left") for d in (64, 128)),
    _case("more queries than keys", seqlen_q=200, seqlen_k=70, causal=True),
    _case("window", window=(70, 20)),
    _case("window, head_dim 128", 128, window=(30, 20)),
    _case("window left", window=(30, None)),
    _case("window right", window=(None, 5)),
    _case("alibi and softcap", alibi="h", softcap=2.0, heads_q=2, heads_kv=2),
    _case("alibi, head_dim 128", 128, alibi="h", causal=True),
    _case("sinks", sinks=True, causal=True, heads_q=2, heads_kv=2),
    _case("sinks without keys", sinks=True, seqlen_q=150, seqlen_k=50, causal=True),
    _case("kv_lengths", batch=3, kv_lengths=(130, 0, 1), causal=True),
    _case("large scale", scale=3.0),
    _case("negative scale", scale=-0.2),
    _case("GQA", **GQA, causal=True),
    _case("head_dim not innermost", layout="bhds"),
    Case("varlen", lengths=((7, 19), (130, 150), (0, 5), (65, 64)), causal=True, head_dim=64, head_dim_v=64),
    Case("varlen, window", lengths=((7, 19), (64, 0), (65, 64)), window=(20, 0), head_dim=128, head_dim_v=128, **GQA),
    Case("varlen, spare tokens", lengths=((7, 7), (130, 130)), spare=(5, 5), alibi="bh", causal=True),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case, machine: Simulator | Hardware) -> None:
    call, want = cases.build(case, FP16, machine.device), cases.expected(case, FP16)
    with torch.no_grad():
        out, lse = call.run(return_lse=True, backend="cuda")
    assert_close("out", out, want.exact.out, want.eager_out, FP16)
    assert_close("lse", lse, want.exact.lse, want.eager_lse, lse.dtype)
    assert machine.kernels[0].startswith("fastattn_sm75_forward_fp16")
    assert not machine.findings
    assert machine.bank_conflicts == 0


GRADIENT_CASES = (
    *(_case(f"alike, head_dim {d}", d, mean=2.0) for d in (64, 128)),
    *(_case(f"queries {n}", seqlen_q=n, causal=True) for n in (1, 15, 16, 65, 129)),
    *(_case(f"keys {n}", seqlen_k=n) for n in (1, 31, 33, 130)),
    *(_case(f"square {n}", 128, seqlen_q=n, seqlen_k=n, causal=True) for n in (17, 64, 130)),
    *(_case(f"head_dim {d}", d, seqlen_q=60, causal=True) for d in (8, 72, 128)),
    *(_case(f"head_dim {d}, softcap", d, seqlen_q=60, softcap=1.5, causal=True) for d in (64, 128)),
    _case("head_dim_v larger", head_dim=40, head_dim_v=128),
    _case("head_dim_v smaller", head_dim=128, head_dim_v=24),
    _case("causal top-left", causal=True, causal_alignment="top-left"),
    _case("more queries than keys", seqlen_q=200, seqlen_k=70, causal=True),
    _case("window", window=(70, 20)),
    _case("window, head_dim 128", 128, window=(30, 20)),
    _case("alibi and softcap", alibi="h", softcap=2.0, heads_q=2, heads_kv=2),
    _case("alibi, head_dim 128", 128, alibi="h", causal=True),
    _case("sinks", sinks=True, causal=True, batch=2, heads_q=2, heads_kv=2),
    _case("kv_lengths", batch=3, kv_lengths=(130, 0, 1), causal=True),
    _case("GQA", **GQA, causal=True),
    _case("GQA, head_dim 128", 128, **GQA, seqlen_q=40, seqlen_k=60),
    _case("head_dim not innermost", layout="bhds"),
    Case("varlen", lengths=((7, 19), (130, 150), (0, 5), (65, 64)), causal=True, head_dim=64, head_dim_v=64),
    Case("varlen, spare", lengths=((7, 7), (130, 130)), spare=(5, 5), alibi="bh", causal=True, sinks=True),
)


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients(case: Case, machine: Simulator | Hardware) -> None:
    call, want = cases.build(case, FP16, machine.device), cases.expected(case, FP16)
    leaves = call.requires_grad()
    out, lse = call.run(return_lse=True, backend="cuda")
    torch.autograd.backward((out, lse), (want.dout.to(out.device), want.dlse.to(out.device)))
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        term = want.exact.terms.get(name, 0.0)
        assert_close(f"d{name}", leaf.grad, want.exact.grads[name], want.eager_grads[name], FP16, largest_term=term)
    for kernel in ("bwd_dq", "bwd_dk(dv)?"):
        assert any(re.match(f"fastattn_sm75_{kernel}_fp16", name) for name in machine.kernels)
    assert not machine.findings
    assert machine.bank_conflicts == 0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_lagging_row_max_is_raised(head_dim: int, machine: Simulator | Hardware) -> None:
    """Keys that grow by far more than a float16 holds, block after block: each block must be done again."""
    q = torch.ones(1, 1, 40, head_dim, dtype=FP16, device=machine.device)
    k = torch.arange(200.0).to(q)[None, None, :, None].expand(1, 1, 200, head_dim) / 8
    v = torch.randn(1, 1, 200, head_dim).to(q)
    out, lse = fastattn.attention(q, k, v, scale=0.125, return_lse=True, backend="cuda")
    want, want_lse = fastattn.reference.attention(q.double(), k.double(), v.double(), scale=0.125, return_lse=True)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-2)
    assert not machine.findings


def test_nonfinite_values(machine: Simulator | Hardware) -> None:
    """Visible NaN and inf spread to the rows that see them, also where no score of a row is a number."""
    q, k, v = torch.randn(3, 1, 2, 150, 64).to(machine.device, FP16)
    q[0, 0, 3] = q[0, 0, 120, 7] = torch.nan
    k[0, 0, 130] = torch.nan
    k[0, 1, 90] = torch.inf
    calls: tuple[dict[str, Any], ...] = ({}, {"causal": True}, {"causal": True, "window": (20, 0)})
    for options in calls:
        out, lse = fastattn.attention(q, k, v, return_lse=True, backend="cuda", **options)
        want, want_lse = fastattn.reference.attention(q, k, v, return_lse=True, **options)
        assert torch.equal(lse.isnan(), want_lse.isnan())
        assert torch.equal(out.isnan(), want.isnan())
    assert not machine.findings


def test_wrong_lengths_stay_within_memory(machine: Simulator | Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator raises where a kernel leaves its tensors. (Lengths on a GPU are not checked; those here are.)"""
    for check in ("_check_cu_seqlens", "_check_lengths"):
        monkeypatch.setattr(values, check, lambda *_: None)
    q = torch.randn(60, 2, 64).to(machine.device, FP16)
    garbage = torch.tensor([-5, 1000, 7, 2**31 - 1], dtype=torch.int32, device=machine.device)
    fastattn.attention_varlen(q, q, q, garbage, garbage.flip(0).contiguous(), causal=True, backend="cuda")
    dense = q.view(2, 30, 2, 64).transpose(1, 2)
    lengths = torch.tensor([2**31 - 1, -7], dtype=torch.int32, device=machine.device)
    fastattn.attention(dense, dense, dense, kv_lengths=lengths, backend="cuda")
    assert len(machine.kernels) == 2
    assert not machine.findings


@pytest.fixture
def usage() -> dict[str, cuda_module.Usage]:
    found = cuda_module.usage("sm_75")
    if not found:
        pytest.skip("the module was built without machine code for sm_75 (FASTATTN_CUDA_ARCHITECTURES)")
    return found


@cuda_machines.needs_simulator
@pytest.mark.parametrize("head_dim", [64, 128])
def test_two_blocks_share_a_multiprocessor(
    head_dim: int, usage: dict[str, cuda_module.Usage], use_backends: Callable[..., None]
) -> None:
    """Of 128 threads each, of the forward pass without softcap and ALiBi."""
    machine = Simulator(capability=75)
    use_backends(cuda.CudaBackend(machine), *dispatch.BACKENDS)
    q = torch.zeros(1, 1, 1, head_dim, dtype=FP16)
    fastattn.attention(q, q, q, backend="cuda")
    name = f"fastattn_sm75_forward_fp16_d{head_dim}"
    assert machine.kernels == [name]
    assert 2 * (usage[name].shared + machine.shared_bytes[name]) <= 64 * 1024
    assert 2 * 128 * -(-usage[name].registers // 8) * 8 <= 65536


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "reason"),
    [
        (75, torch.bfloat16, 64, r"its dtype is torch.bfloat16, and on a GPU of compute capability 7.5"),
        (75, torch.float16, 136, r"head_dim is 136, .* at most 128 on a GPU of compute capability 7.5"),
        (75, torch.float16, 60, "multiples of 8"),
        (70, torch.float16, 64, r"compute capability 7.0, .* at least 7.5"),
    ],
)
def test_refusals(
    capability: int, dtype: torch.dtype, head_dim: int, reason: str, use_backends: Callable[..., None]
) -> None:
    use_backends(cuda.CudaBackend(Simulator(capability)), *dispatch.BACKENDS)
    q = torch.zeros(1, 1, 16, head_dim, dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        fastattn.attention(q, q, q, backend="cuda")
