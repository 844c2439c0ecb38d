"""The Triton kernels as compiled for GPUs, executed in a simulator of PTX: results, races, bounds.

Needs the simulator `ptxsim` on the path, or beside the project in ../shared; the tests skip without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastattn.backends import dispatch
from fastattn.kernels.machine import interpreting

from .. import cache_cases, cases
from ..cache_cases import CacheCase
from ..cases import GQA, Case
from ..tolerance import assert_close

pytest.importorskip("triton", reason="Triton is not installed")

from fastattn.backends.triton import TritonBackend

from ..cuda import simulator

_without = simulator.missing()

pytestmark = [
    pytest.mark.skipif(_without is not None, reason=str(_without)),
    pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter"),
    pytest.mark.usefixtures("poisoned_memory"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Run = tuple[Any, torch.dtype, int]
"""A case, the dtype, and the compute capability that it is compiled for."""

_WIDE: dict[str, Any] = {"batch": 1, "heads_q": 2, "heads_kv": 2, "head_dim": 64, "head_dim_v": 64}
_LONG: dict[str, Any] = {**_WIDE, "seqlen_q": 150, "seqlen_k": 201}


def _case(name: str, **options: Any) -> Case:
    return Case(name, **{**_LONG, **options})


PLAIN: tuple[Run, ...] = (
    (_case("full"), BF16, 80),
    (_case("full"), BF16, 90),
    (_case("full, three blocks of queries", seqlen_q=300, seqlen_k=300), BF16, 80),
    (_case("full, even number of blocks", seqlen_q=128, seqlen_k=256), BF16, 80),
    (_case("full, even number of blocks", seqlen_q=128, seqlen_k=256), BF16, 90),
    (_case("causal", causal=True), BF16, 80),
    (_case("causal", causal=True), BF16, 90),
    (_case("head_dim 128", head_dim=128, head_dim_v=128, causal=True), BF16, 80),
    (_case("head_dim 128", head_dim=128, head_dim_v=128, causal=True), BF16, 90),
    (_case("head_dim 80", head_dim=80, head_dim_v=80, causal=True), BF16, 80),
    (_case("head_dim 80", head_dim=80, head_dim_v=80, causal=True), BF16, 90),
    (_case("head_dim 40 and 200", head_dim=40, head_dim_v=200, seqlen_q=37, seqlen_k=70), BF16, 80),
    (_case("head_dim 256", head_dim=256, head_dim_v=256, seqlen_q=70, seqlen_k=70), BF16, 80),
    (_case("one query", seqlen_q=1), BF16, 80),
    (_case("one key", seqlen_k=1), BF16, 80),
    (_case("float16", causal=True), FP16, 80),
    (_case("float16", causal=True), FP16, 90),
    (_case("float32", seqlen_q=70, causal=True), FP32, 80),
    (_case("float32", seqlen_q=70, causal=True), FP32, 90),
)

FEATURES: tuple[Run, ...] = tuple(
    (case, BF16, 80)
    for case in (
        _case("causal top-left", causal=True, causal_alignment="top-left"),
        _case("window", window=(70, 20)),
        _case("window left", window=(30, None)),
        _case("mask", mask="1hqk", hidden_rows=(0, 149)),
        _case("bias", bias="1hqk"),
        _case("bias summed over queries", bias="h1k", seqlen_q=300),
        _case("bias summed over keys", bias="q1"),
        _case("bias summed over all", bias="1"),
        _case("alibi", alibi="h", causal=True),
        _case("softcap", softcap=1.5),
        _case("sinks", sinks=True, causal=True),
        _case("kv_lengths", batch=2, kv_lengths=(130, 0), causal=True),
        _case("q_offset", batch=2, q_offset=(60, -30), causal=True, alibi="h", dropout_p=0.3),
        _case("q_offset past the keys", batch=2, q_offset=(190, 5000), window=(40, 30), bias="1hqk"),
        _case("negative scale", scale=-0.2),
        _case("dropout", dropout_p=0.3),
        _case("GQA", **GQA, seqlen_q=70, causal=True),
        _case("head_dim not innermost", layout="bhds", seqlen_k=150),
        _case("scattered", layout="scattered", seqlen_q=70, seqlen_k=70),
        _case("more queries than keys", seqlen_q=201, seqlen_k=150, causal=True),
        replace(cases.COMBINATIONS[1], name="everything together"),
        Case("varlen", lengths=((7, 19), (130, 150), (0, 5), (65, 64)), causal=True, heads_q=2, heads_kv=2),
        replace(cases.VARLEN[-1], name="varlen, everything together"),
        Case("varlen, q_offset", lengths=((7, 19), (130, 150), (65, 64)), q_offset=(9, -20, 5), causal=True, **GQA),
        Case("varlen, spare tokens, slopes per sequence", lengths=((7, 7),), spare=(5, 5), alibi="bh", causal=True),
    )
) + tuple(
    (case, BF16, 90)
    for case in (
        _case("window", window=(70, 20)),
        _case("mask and bias", mask="1hqk", bias="1hqk"),
        _case("dropout, softcap, alibi, sinks", dropout_p=0.3, softcap=2.0, alibi="h", sinks=True),
        Case("varlen", lengths=((7, 19), (130, 150), (0, 5), (65, 64)), window=(20, 0), **GQA),
    )
)

_CACHE: dict[str, Any] = {"head_dim": 64, "head_dim_v": 64, "lengths": (257, 64, 128), "capacity": 320}
CACHES: tuple[Run, ...] = (
    (CacheCase("decode", seqlen_new=1, **_CACHE), BF16, 80),
    (CacheCase("decode", seqlen_new=1, **_CACHE), BF16, 90),
    (CacheCase("decode, MQA", heads_q=8, heads_kv=1, seqlen_new=1, **_CACHE), FP16, 80),
    (CacheCase("paged decode", seqlen_new=1, page_size=16, **_CACHE), BF16, 80),
    (CacheCase("paged decode", seqlen_new=1, page_size=16, **_CACHE), BF16, 90),
    (CacheCase("decode, rotary", seqlen_new=1, rotary_dim=64, **_CACHE), BF16, 80),
    (
        CacheCase("chunk, interleaved rotary", seqlen_q=5, seqlen_new=5, rotary_dim=32, interleaved=True, **_CACHE),
        BF16,
        80,
    ),
    (CacheCase("chunk, q_offset", q_offset=(250, 70, 0), seqlen_q=5, seqlen_new=5, rotary_dim=32, **_CACHE), BF16, 80),
    (
        CacheCase("decode, q_offset past the keys", q_offset=(300, 9, 9999), window=(50, None), seqlen_new=1, **_CACHE),
        BF16,
        80,
    ),
    (CacheCase("prefill", lengths=(0, 0), seqlen_q=70, seqlen_new=70, capacity=80), BF16, 80),
    (replace(cache_cases.CONTIGUOUS[-1], name="everything"), FP32, 80),
    (replace(cache_cases.PAGED[-1], name="paged, everything"), BF16, 80),
)


def _name(run: Run) -> str:
    return f"{run[0]}-{str(run[1]).removeprefix('torch.')}-sm_{run[2]}"


@pytest.fixture
def simulate(use_backends: Callable[..., None]) -> Callable[[int], simulator.Simulator]:
    """Makes `backend="triton"` run in a simulator of a GPU of some compute capability."""

    def install(capability: int) -> simulator.Simulator:
        machine = simulator.Simulator(capability)
        use_backends(TritonBackend(machine), *dispatch.BACKENDS[1:])
        return machine

    return install


@pytest.mark.parametrize("run", [*PLAIN, *FEATURES], ids=_name)
def test_forward_and_backward(run: Run, simulate: Callable[[int], simulator.Simulator]) -> None:
    case, dtype, capability = run
    machine = simulate(capability)
    call, want = cases.build(case, dtype), cases.expected(case, dtype)
    leaves = call.requires_grad()
    out, lse = call.run(return_lse=True, backend="triton")
    assert_close("out", out, want.exact.out, want.eager_out, dtype)
    assert_close("lse", lse, want.exact.lse, want.eager_lse, lse.dtype)
    torch.autograd.backward((out, lse), (want.dout, want.dlse))
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        term = want.exact.terms.get(name, 0.0)
        assert_close(f"d{name}", leaf.grad, want.exact.grads[name], want.eager_grads[name], dtype, largest_term=term)
    assert {"forward", "bwd_preprocess", "bwd_dq", "bwd_dkdv"} <= set(machine.kernels)
    assert not machine.findings


@pytest.mark.parametrize("run", CACHES, ids=_name)
def test_caches(run: Run, simulate: Callable[[int], simulator.Simulator]) -> None:
    case, dtype, capability = run
    machine = simulate(capability)
    call, want = cache_cases.build(case, dtype), cache_cases.expected(case, dtype)
    out, lse = call.run(return_lse=True, backend="triton")
    assert_close("out", out, want.exact.out, want.eager_out, dtype)
    assert_close("lse", lse, want.exact.lse, want.eager_lse, cache_cases.lse_dtype(case, dtype))
    assert "append_kv" in machine.kernels
    assert not machine.findings
    assert_close("v_cache", call.v_cache.nan_to_num(), np.nan_to_num(want.v_cache), None, dtype)


def test_splits_of_the_keys(simulate: Callable[[int], simulator.Simulator]) -> None:
    """A few queries over many keys are cut into parts, and merged."""
    machine = simulate(80)
    case = _case("one query, many keys", seqlen_q=1, seqlen_k=1200, sinks=True, **GQA)
    want = cases.expected(case, BF16)
    out, lse = cases.build(case, BF16).run(return_lse=True, backend="triton")
    assert_close("out", out, want.exact.out, want.eager_out, BF16)
    assert_close("lse", lse, want.exact.lse, want.eager_lse, lse.dtype)
    assert machine.kernels == ["forward", "combine"]
    assert not machine.findings
