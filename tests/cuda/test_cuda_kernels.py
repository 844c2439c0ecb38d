"""The CUDA C++ kernels as built, executed in a simulator of PTX and, with -m gpu, on a GPU: results, races, bounds.

Needs a module built with nvcc, and the simulator `ptxsim` on the path, or beside the project in ../shared; the tests
skip without them. Forward passes are tested here, gradients and calls with a cache in files of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from fastattn.backends import dispatch
from fastattn.backends.native import cuda

from .. import cases
from ..cases import GQA, Case
from ..tolerance import assert_close

pytest.importorskip("triton", reason="Triton, whose cuobjdump takes the PTX out of the module, is not installed")

from benchmarks.inspect.cuda_simulator import Simulator

from .cuda_machines import Hardware

pytestmark = [
    pytest.mark.skipif(cuda._cuda is None, reason="fastattn was built without nvcc"),
    pytest.mark.usefixtures("poisoned_memory"),
]

CAPABILITY = 80
BF16, FP16 = torch.bfloat16, torch.float16
_BASE: dict[str, Any] = {"batch": 1, "heads_q": 2, "heads_kv": 2, "head_dim": 64, "head_dim_v": 64}


def _case(name: str, **options: Any) -> Case:
    return Case(name, **{**_BASE, "seqlen_q": 150, "seqlen_k": 201, **options})


def _dims(head_dim: int, head_dim_v: int | None = None) -> dict[str, int]:
    return {"head_dim": head_dim, "head_dim_v": head_dim_v or head_dim, "heads_q": 1, "heads_kv": 1}


SIZES = (1, 17, 63, 64, 65, 127, 200, 257)
CASES: tuple[tuple[Case, torch.dtype], ...] = (
    *((_case(f"queries {n}", seqlen_q=n, causal=True), BF16) for n in SIZES),
    *((_case(f"keys {n}", seqlen_k=n), BF16) for n in SIZES),
    *((_case(f"square {n}", seqlen_q=n, seqlen_k=n, causal=True, **_dims(128)), BF16) for n in SIZES),
    *((_case(f"head_dim {d}", causal=True, **_dims(d)), BF16) for d in (8, 32, 40, 80, 96, 128, 192, 200, 256)),
    *((_case(f"head_dim {d}, float16", **_dims(d)), FP16) for d in (32, 64, 96, 128, 192, 256)),
    *((_case(f"head_dim {d}, softcap", softcap=1.5, causal=True, **_dims(d)), BF16) for d in (32, 96, 128, 192, 256)),
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
    (_case("sinks", sinks=True, causal=True), BF16),
    (_case("sinks without keys", sinks=True, seqlen_q=201, seqlen_k=50, causal=True), BF16),
    (_case("kv_lengths", batch=2, kv_lengths=(130, 0), causal=True), BF16),
    (_case("kv_lengths one", batch=2, kv_lengths=(1, 200)), BF16),
    (_case("q_offset", batch=2, q_offset=(60, -30), causal=True), BF16),
    (_case("q_offset past the keys", batch=2, q_offset=(190, 5000), window=(40, 30), alibi="h"), BF16),
    (_case("q_offset at its bounds", batch=2, q_offset=(-(2**28), 2**28), window=(2**28, 2**28)), BF16),
    (_case("negative scale", scale=-0.2), BF16),
    (_case("large scale", scale=3.0), BF16),
    (_case("large scale, float16", scale=3.0), FP16),
    (_case("GQA", **{**_BASE, **GQA, "head_dim": 64, "head_dim_v": 64}, causal=True), BF16),
    (_case("head_dim not innermost", layout="bhds"), BF16),
    (_case("scattered", layout="scattered", seqlen_q=70, seqlen_k=70), BF16),
    (Case("varlen", lengths=((7, 19), (130, 150), (0, 5), (65, 64)), causal=True, heads_q=2, heads_kv=2), BF16),
    (Case("varlen, window", lengths=((7, 19), (130, 150), (64, 0), (65, 64)), window=(20, 0), **GQA), BF16),
    (Case("varlen, q_offset", lengths=((7, 19), (130, 150), (65, 64)), q_offset=(9, -20, 5), causal=True, **GQA), BF16),
    (Case("varlen, spare tokens", lengths=((7, 7), (200, 200)), spare=(5, 5), alibi="bh", causal=True), BF16),
)


@pytest.mark.parametrize("run", CASES, ids=lambda run: f"{run[0]}-{str(run[1]).removeprefix('torch.')}")
def test_forward(run: tuple[Case, torch.dtype], machine: Simulator | Hardware) -> None:
    case, dtype = run
    call, want = cases.build(case, dtype, machine.device), cases.expected(case, dtype)
    with torch.no_grad():
        out, lse = call.run(return_lse=True, backend="cuda")
    assert_close("out", out, want.exact.out, want.eager_out, dtype)
    assert_close("lse", lse, want.exact.lse, want.eager_lse, lse.dtype)
    few = not case.lengths and case.seqlen_q <= 16
    assert machine.kernels[0].startswith("fastattn_sm80_decode_" if few else "fastattn_sm80_forward_")
    assert not machine.findings


def test_lagging_row_max_is_raised(machine: Simulator | Hardware) -> None:
    """Keys that grow by far more than a float16 holds, block after block: each block must be done again."""
    for dtype in (BF16, FP16):
        q = torch.ones(1, 1, 150, 64, dtype=dtype, device=machine.device)
        k = torch.arange(300.0).to(q)[None, None, :, None].expand(1, 1, 300, 64) / 8
        v = torch.randn(1, 1, 300, 64).to(q)
        out, lse = fastattn.attention(q, k, v, return_lse=True, backend="cuda")
        want, want_lse = fastattn.reference.attention(q.double(), k.double(), v.double(), return_lse=True)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=0)
        torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-2)
    assert not machine.findings


def test_nonfinite_values(machine: Simulator | Hardware) -> None:
    """Visible NaN and inf spread to the rows that see them, also where no score of a row is a number."""
    q, k, v = torch.randn(3, 1, 2, 200, 64).to(machine.device, BF16)
    q[0, 0, 3] = q[0, 0, 150, 7] = torch.nan
    k[0, 0, 180] = torch.nan
    k[0, 1, 120] = torch.inf
    sinks = torch.tensor([0.5, -torch.inf], device=machine.device)
    calls: list[dict[str, Any]] = [{}, {"causal": True}, {"causal": True, "window": (20, 0)}]
    for options in (*calls, {"causal": True, "sinks": sinks}):
        out, lse = fastattn.attention(q, k, v, return_lse=True, backend="cuda", **options)
        want, want_lse = fastattn.reference.attention(q, k, v, return_lse=True, **options)
        assert torch.equal(lse.isnan(), want_lse.isnan())
        assert torch.equal(out.isnan(), want.isnan())
    assert not machine.findings


def test_explain_names_copies(use_backends: Callable[..., None]) -> None:
    use_backends(cuda.CudaBackend(Simulator()), *dispatch.BACKENDS)
    q = torch.randn(1, 2, 64, 64).bfloat16()
    k = torch.randn(1, 2, 64, 65).bfloat16()[..., 1:]
    report = fastattn.explain(q, k, q, backend="cuda")
    assert report.backend == "cuda"
    assert len(report.notes) == 1
    assert report.notes[0].startswith("k is copied first")


@pytest.mark.parametrize(
    ("options", "shape", "dtype", "reason"),
    [
        ({}, (1, 2, 16, 64), torch.float32, "its dtype is torch.float32"),
        ({}, (1, 2, 16, 60), BF16, "multiples of 8"),
        ({}, (1, 2, 16, 264), BF16, "at most 256"),
        ({"dropout_p": 0.5}, (1, 2, 16, 64), BF16, "dropout"),
        ({"mask": torch.ones(16, 16, dtype=torch.bool)}, (1, 2, 16, 64), BF16, "mask"),
        ({"bias": torch.ones(16, 16)}, (1, 2, 16, 64), BF16, "bias"),
    ],
)
def test_refusals(
    options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, reason: str, use_backends: Callable[..., None]
) -> None:
    use_backends(cuda.CudaBackend(Simulator()), *dispatch.BACKENDS)
    q = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        fastattn.attention(q, q, q, backend="cuda", **options)
