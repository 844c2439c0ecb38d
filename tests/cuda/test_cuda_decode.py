"""Calls with a cache on the CUDA C++ kernels as built: results, what is written, races, bounds.

Needs what tests/cuda/test_cuda_kernels.py needs, and skips without it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.backends import dispatch
from fastattn.backends.native import cuda
from fastattn.problem import Inputs, Options, describe

from ..cache_cases import CONTIGUOUS, PAGED, ROTARY, CacheCase, build
from ..test_kv_cache import check

pytest.importorskip("triton", reason="Triton, whose cuobjdump takes the PTX out of the module, is not installed")

from benchmarks.inspect.cuda_simulator import Simulator

from . import cuda_machines
from .cuda_machines import Hardware

pytestmark = [
    pytest.mark.skipif(cuda._cuda is None, reason="fastattn was built without nvcc"),
    pytest.mark.usefixtures("poisoned_memory"),
]

CAPABILITY = 80
BF16, FP16 = torch.bfloat16, torch.float16
RAGGED: dict[str, Any] = {"lengths": (77, 0, 30), "capacity": 96, "head_dim": 64, "head_dim_v": 64}
STEP = {**RAGGED, "seqlen_new": 1}
CHUNK = {**RAGGED, "seqlen_q": 6, "seqlen_new": 6}
LONG = {**STEP, "lengths": (650, 0, 129), "capacity": 704}
MANY = {**RAGGED, "lengths": (40, 5), "capacity": 144, "seqlen_q": 70, "seqlen_new": 70}
EVERYTHING = {"window": (40, 2), "alibi": True, "softcap": 0.9, "sinks": True, "scale": 0.4, "rotary_dim": 24}


def _dims(head_dim: int, head_dim_v: int | None = None) -> dict[str, Any]:
    return {**CHUNK, "lengths": (77, 3), "head_dim": head_dim, "head_dim_v": head_dim_v or head_dim}


def _heads(heads_q: int, heads_kv: int) -> dict[str, int]:
    return {"heads_q": heads_q, "heads_kv": heads_kv}


CASES: tuple[tuple[CacheCase, torch.dtype], ...] = (
    *((CacheCase(f"head_dim {d}", **_dims(d)), BF16) for d in (8, 24, 32, 40, 64, 80, 96, 128, 160, 192, 200, 256)),
    *((CacheCase(f"head_dim {d}, float16", **_dims(d)), FP16) for d in (32, 64, 96, 128, 192, 256)),
    *((CacheCase(f"head_dim {d}, softcap", softcap=0.9, **_dims(d)), FP16) for d in (32, 96, 128, 192, 256)),
    (CacheCase("head_dim_v larger", **_dims(40, 128)), BF16),
    (CacheCase("no head_dim_v", **{**_dims(64), "head_dim_v": 0}), BF16),
    (CacheCase("head_dim_v smaller", **_dims(192, 128)), BF16),
    *((CacheCase(f"queries {n}", **{**STEP, "seqlen_q": n}), BF16) for n in range(1, 17)),
    *(
        (CacheCase(f"queries {n}", **{**STEP, "capacity": 128, "seqlen_q": n, "seqlen_new": n}), FP16)
        for n in (17, 24, 50)
    ),
    *(
        (CacheCase(f"heads {q} over {kv}", **STEP, **_heads(q, kv)), BF16)
        for q, kv in ((1, 1), (6, 2), (16, 1), (20, 1))
    ),
    *(
        (CacheCase(f"heads {q} over {kv}, chunk", **CHUNK, **_heads(q, kv)), BF16)
        for q, kv in ((3, 3), (5, 1), (16, 2))
    ),
    *((CacheCase(f"pages of {n}", page_size=n, **{**STEP, "capacity": 768}), BF16) for n in (16, 32, 48, 64, 256)),
    *((CacheCase(f"pages of {n}, chunk", page_size=n, **CHUNK, **_heads(6, 2)), FP16) for n in (16, 32)),
    (CacheCase("prefill", **{**RAGGED, "lengths": (0, 0), "seqlen_q": 40, "seqlen_new": 40}), BF16),
    (
        CacheCase("prefill of pages", page_size=16, **{**CHUNK, "lengths": (0, 16), "seqlen_q": 40, "seqlen_new": 40}),
        BF16,
    ),
    *((CacheCase(f"many queries over {n}", **{**MANY, "lengths": (n, 5)}), BF16) for n in (0, 40)),
    (CacheCase("many queries, everything", **MANY, **EVERYTHING), FP16),
    (CacheCase("many queries of pages", page_size=16, **MANY), BF16),
    (CacheCase("long", **LONG), BF16),
    (CacheCase("long, float16", **LONG, **_heads(8, 1)), FP16),
    (CacheCase("long, pages", page_size=64, **LONG, sinks=True), BF16),
    (CacheCase("long, not causal", causal=False, **{**LONG, "seqlen_q": 9}), BF16),
    (CacheCase("long, window", **LONG, window=(300, None)), BF16),
    (CacheCase("long, head_dim 256", **{**LONG, "head_dim": 256, "head_dim_v": 256}), BF16),
    (CacheCase("top-left", causal_alignment="top-left", **CHUNK), BF16),
    (
        CacheCase(
            "top-left, window, pages",
            causal_alignment="top-left",
            page_size=16,
            window=(3, None),
            **{**CHUNK, "seqlen_q": 120},
        ),
        BF16,
    ),
    (CacheCase("q_offset", q_offset=(7, 0, 30), **CHUNK), BF16),
    (
        CacheCase("q_offset before and past", q_offset=(-50, 3, 5000), window=(20, None), sinks=True, **LONG),
        BF16,
    ),
    (CacheCase("q_offset, rotary", q_offset=(7, 0, 30), rotary_dim=64, page_size=16, **CHUNK), BF16),
    (CacheCase("window", window=(20, 0), **CHUNK), BF16),
    (CacheCase("window both sides", window=(20, 3), causal=False, **CHUNK), FP16),
    (CacheCase("alibi", alibi=True, **CHUNK, **_heads(6, 2)), BF16),
    (CacheCase("alibi and softcap", alibi=True, softcap=2.0, **CHUNK), FP16),
    (CacheCase("sinks", sinks=True, **CHUNK), BF16),
    (CacheCase("sinks, float16", sinks=True, **LONG), FP16),
    (CacheCase("large scale", scale=3.0, **CHUNK), FP16),
    (CacheCase("rotary", rotary_dim=64, **CHUNK), BF16),
    (CacheCase("rotary interleaved", rotary_dim=64, interleaved=True, **CHUNK), FP16),
    (CacheCase("rotary of a part", rotary_dim=20, **LONG), BF16),
    (CacheCase("rotary, pages", rotary_dim=32, interleaved=True, page_size=32, **CHUNK), BF16),
    (CacheCase("rotary without new keys", rotary_dim=64, **{**RAGGED, "seqlen_q": 3}), BF16),
    (CacheCase("rotary, more queries than keys", rotary_dim=64, **{**RAGGED, "lengths": (2, 0), "seqlen_q": 5}), BF16),
    (CacheCase("everything", **CHUNK, **EVERYTHING), BF16),
    (CacheCase("everything, pages", page_size=16, interleaved=True, **{**LONG, "seqlen_q": 5}, **EVERYTHING), FP16),
    (CacheCase("tokens first", layout="tokens first", **CHUNK), BF16),
    (CacheCase("tokens first, pages", layout="tokens first", page_size=16, **CHUNK), BF16),
)


def _takes(case: CacheCase) -> bool:
    sizes = (case.head_dim % 8, case.head_dim_v % 8, case.page_size % 16)
    return not (case.mask or case.bias or case.layout == "scattered" or any(sizes))


OF_ALL_BACKENDS = [case for case in (*CONTIGUOUS, *ROTARY, *PAGED) if _takes(case)]


@pytest.mark.parametrize("run", CASES, ids=lambda run: f"{run[0]}-{str(run[1]).removeprefix('torch.')}")
def test_decode(run: tuple[CacheCase, torch.dtype], machine: Simulator | Hardware) -> None:
    case, dtype = run
    check(case, dtype, "cuda", machine.device)
    wanted = [r"append_kv_(bf|fp)16"] if case.seqlen_new or case.rotary_dim else []
    many = case.seqlen_q > 16 and not case.page_size
    wanted.append(f"{'forward' if many else 'decode'}_(bf|fp)16(_score_mod)?_d[0-9]+")
    if case.capacity > 256 and case.window is None and not many:
        wanted.append(r"combine_(bf|fp)16")
    assert len(machine.kernels) >= len(wanted)
    for name, pattern in zip(machine.kernels, wanted, strict=False):
        assert re.fullmatch(f"fastattn_sm80_{pattern}", name)
    assert not machine.findings


@pytest.mark.parametrize("case", OF_ALL_BACKENDS, ids=str)
def test_what_all_backends_do(case: CacheCase, machine: Simulator | Hardware) -> None:
    check(case, BF16, "cuda", machine.device)
    assert not machine.findings


@pytest.mark.parametrize(("multiprocessors", "launches"), [(1, 2), (6, 3), (12, 3), (40, 3)])
def test_any_number_of_splits(multiprocessors: int, launches: int, machine: Simulator | Hardware) -> None:
    machine.multiprocessors = multiprocessors
    check(CacheCase("split", sinks=True, **LONG), BF16, "cuda", machine.device)
    assert len(machine.kernels) == launches
    assert not machine.findings


def test_number_of_splits() -> None:
    splits = cuda._cuda.splits
    assert splits(8, 8192, 108) == 13  # 104 of 108 at once
    assert splits(1, 1 << 20, 108) == 108
    assert splits(108, 8192, 108) == splits(1000, 8192, 108) == 1
    assert splits(0, 8192, 108) == splits(8, 0, 108) == 1
    assert splits(1, 1024, 108) == 8  # no fewer keys than 128 each
    assert splits(60, 1 << 16, 108) == 7  # 1 split would leave 48 idle; 420 blocks nearly fill 4 waves


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_combine_is_merge_states(dtype: torch.dtype, machine: Simulator | Hardware) -> None:
    """The result is what `fastattn.merge_states` makes of the splits' results, one of which may have seen nothing."""
    call = build(CacheCase("merged", **{**LONG, "lengths": (650, 0, 129, 5)}, heads_q=16), dtype, machine.device)
    out, lse = call.run(return_lse=True, backend="cuda")
    rows = lse.numel()  # 64: both parts of the workspace are whole multiples of 256 bytes
    numbers = machine.tensors["workspace"].view(torch.float32)
    count = numbers.numel() // (rows * 65)
    assert count > 1
    part_out, part_lse = numbers.split((count * rows * 64, count * rows))
    lses = part_lse.view(count, *lse.shape) * math.log(2.0)
    assert (lses == -torch.inf).any()
    want, want_lse = fastattn.merge_states(part_out.view(count, *out.shape), lses)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, want.to(dtype), rtol=2**-7, atol=1e-6)  # rounded once more, by one unit at most


@cuda_machines.needs_simulator
@pytest.mark.parametrize("page_size", [0, 64])
def test_cost_of_a_piece(page_size: int, use_backends: Callable[..., None]) -> None:
    """16 keys of head_dim 128: 32 products, few other instructions, no conflict in shared memory."""
    taken = []
    for keys in (512, 1536):
        machine = Simulator(multiprocessors=1)
        use_backends(cuda.CudaBackend(machine), *dispatch.BACKENDS)
        sizes = {"lengths": (keys,), "capacity": keys, "head_dim": 128, "head_dim_v": 128}
        build(CacheCase("cost", page_size=page_size, heads_q=8, heads_kv=1, **sizes), BF16).run(backend="cuda")
        (counters,) = machine.counters
        moves = counters["by_class"]["mov"] + counters["fused_mul_add_pairs"]
        taken.append((counters["warp_instrs"] - moves, counters["by_class"]["tensor"], counters["bank_conflicts"]))
    instructions, products, conflicts = ((more - less) / 64 for less, more in zip(*taken, strict=True))
    assert products == 32
    assert instructions <= 240
    assert conflicts == 0


def test_same_bits_again(machine: Simulator | Hardware) -> None:
    case = CacheCase("again", **LONG, **EVERYTHING)
    first, second = (build(case, BF16, machine.device).run(return_lse=True, backend="cuda") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_lagging_row_max_is_raised(machine: Simulator | Hardware) -> None:
    """Keys that grow by far more than a float16 holds, piece after piece."""
    for dtype in (BF16, FP16):
        q = torch.ones(1, 2, 3, 64, dtype=dtype, device=machine.device)
        k = torch.arange(300.0).to(q)[None, None, :, None].expand(1, 1, 300, 64).contiguous()
        v = torch.randn(1, 1, 300, 64).to(q)
        lengths = torch.tensor([299], dtype=torch.int32, device=machine.device)
        out, lse = fastattn.attention_with_kv_cache(
            q, k, v, cache_lengths=lengths, causal=True, return_lse=True, backend="cuda"
        )
        want, want_lse = fastattn.reference.attention(
            *(x.double() for x in (q, k, v)), kv_lengths=lengths, causal=True, return_lse=True
        )
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=0)
        torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-2)
    assert not machine.findings


def test_nonfinite_values(machine: Simulator | Hardware) -> None:
    """Visible NaN and inf spread to the rows that see them; keys that the window hides from all rows are not read."""
    q, k, v = (torch.randn(2, 2, n, 64).to(machine.device, BF16) for n in (2, 500, 500))
    k[:, :, :101] = v[:, :, :101] = torch.nan
    k[1, 0, 498] = torch.nan
    k[1, 1, 200] = torch.inf
    v[0, 0, 499] = torch.inf
    lengths = torch.tensor([500, 500], dtype=torch.int32, device=machine.device)
    clean_k, clean_v = (torch.where(torch.arange(500, device=machine.device)[:, None] < 101, 0.0, x) for x in (k, v))
    for sinks in (None, torch.tensor([0.5, -torch.inf], device=machine.device)):
        options: dict[str, Any] = {"window": (397, 0), "sinks": sinks, "return_lse": True}
        out, lse = fastattn.attention_with_kv_cache(q, k, v, cache_lengths=lengths, backend="cuda", **options)
        want, want_lse = fastattn.reference.attention(q, clean_k, clean_v, **options)
        for found, expected in ((out, want), (lse, want_lse)):
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.isposinf(), expected.isposinf())
    assert "combine" in machine.kernels[-1]
    assert not machine.findings


GARBAGE = (-(2**31), -1, 0, 5, 100, 2**20, 2**31 - 1)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("cache_lengths", CHUNK),
        ("cache_lengths", MANY),
        ("cache_lengths", {**CHUNK, "page_size": 16}),
        ("q_offset", {**CHUNK, "q_offset": (0, 0, 0), "window": (2**31, 3)}),
        ("q_offset", {**LONG, "q_offset": (0, 0, 0), "page_size": 32}),
        ("block_table", {**CHUNK, "page_size": 16}),
        ("block_table", {**LONG, "page_size": 32}),
    ],
)
def test_garbage_does_not_lead_out_of_memory(name: str, sizes: dict[str, Any], machine: Simulator | Hardware) -> None:
    """Index tensors on a GPU are checked by nobody; the simulator raises on an access outside of a tensor."""
    case = CacheCase("garbage", rotary_dim=16, **sizes)
    for first, second in zip(GARBAGE, GARBAGE[1:] + GARBAGE[:1], strict=True):
        call = build(case, BF16, machine.device)
        inputs = _inputs(call.q, call.k_cache, call.v_cache, call.options)
        wrong = {"cache_lengths": inputs.kv_lengths, "q_offset": inputs.q_offset}.get(name, inputs.block_table)
        assert wrong is not None
        wrong.flatten()[::2], wrong.flatten()[1::2] = first, second
        left, right = case.window or (None, None)
        problem = describe("cache", inputs, Options(True, left, right))
        cuda.CudaBackend(machine).decode(problem, inputs)
    assert not machine.findings


def test_no_pages_at_all(machine: Simulator | Hardware) -> None:
    """Not even lengths that say otherwise make the kernels look for keys where there are none."""
    call = build(CacheCase("no pages", page_size=16, **RAGGED), BF16, machine.device)
    inputs = _inputs(call.q, call.k_cache[:0], call.v_cache[:0], call.options)
    out, lse = cuda.CudaBackend(machine).decode(describe("cache", inputs, Options()), inputs)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def _inputs(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Inputs:
    cos, sin, _ = options.get("rotary", (None, None, False))
    given = {name: options.get(name) for name in ("q_offset", "k_new", "v_new", "block_table")}
    return Inputs(q, k, v, kv_lengths=options["cache_lengths"], cos=cos, sin=sin, **given)


def test_version_counters_see_the_write(machine: Simulator | Hardware) -> None:
    call = build(CacheCase("counted", **STEP), BF16, machine.device)
    before = call.k_cache._version, call.v_cache._version
    call.run(backend="cuda")
    assert call.k_cache._version > before[0]
    assert call.v_cache._version > before[1]


def test_queries_of_any_layout(machine: Simulator | Hardware) -> None:
    """They are copied if they must be, and explain says so."""
    call = build(CacheCase("layout", **CHUNK), BF16, machine.device)
    want = build(call.case, BF16, machine.device).run(backend="cuda")
    plain = call.q
    call.q = plain.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(call.run(backend="cuda"), want)
    for q, notes in ((plain, 0), (call.q, 1)):
        inputs = _inputs(q, call.k_cache, call.v_cache, call.options)
        report = dispatch.explain_choice(describe("cache", inputs, Options()), inputs, "cuda")
        assert len(report.notes) == notes
        assert all(note.startswith("q is copied first, as its last stride is 6") for note in report.notes)
    assert not machine.findings


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"page_size": 24}, "its page size is 24, and these kernels take multiples of 16"),
        ({"layout": "scattered"}, "its cache, which is not copied, has rows that are not contiguous"),
        ({"mask": True}, "it uses mask"),
        ({"head_dim": 60}, "head_dim is 60"),
    ],
)
def test_refusals(changes: dict[str, Any], reason: str, machine: Simulator | Hardware) -> None:
    """A backend asked for by name says why it cannot; automatic choice takes another."""
    case = dataclasses.replace(CacheCase("refused", **STEP), **changes)
    with pytest.raises(ValueError, match=reason):
        build(case, BF16, machine.device).run(backend="cuda")
    build(case, BF16, machine.device).run()
    assert machine.kernels == []
