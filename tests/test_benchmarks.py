"""The benchmark harness: formulas against counting, a gate that refuses, fair timing, faithful records."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from benchmarks import (
    cli,
    costs,
    harness,
    machine,
    memory,
    peaks,
    report,
    results,
    rivals,
    rivals_extra,
    timing,
)
from benchmarks.cases import Case
from benchmarks.data import Data, hidden_pairs, make_cold_data, make_data, options
from benchmarks.gate import check, expect, max_error
from benchmarks.plot import has_curves, plot
from benchmarks.results import FAILED, RAN, SKIPPED, WRONG, CaseResult, Measurement, Run
from benchmarks.suites import SUITES, dense, ragged
from benchmarks.timing import Effort, interleave

CPU = torch.device("cpu")
BACKENDS = ", ".join(fastattn.available_backends())
BRIEF = Effort(budget=0.0, min_rounds=3)
PEAKS = peaks.Peaks({"float32": 2e11, "bfloat16": 4e11, "float16": 1e10}, 2048, 3e10, 2e10, 2**28)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Parallel regions of tiny calls stall for milliseconds each when other tests hold the second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes: Any) -> Case:
    settings = {"seqlen": 24, "dtype": "float32", "heads": 2, "head_dim": 16, **changes}
    return dense("tiny", **settings)


def unequal_lengths(**changes: Any) -> Case:
    case = ragged("tiny", (5, 12, 1), dtype="float32", heads=2, head_dim=16, **changes)
    return dataclasses.replace(case, lengths_k=(9, 12, 30), seqlen_k=30)


FEATURES = [
    tiny(),
    tiny(dtype="bfloat16", mode="train"),
    tiny(dtype="float16", mode="train", causal=True),
    tiny(dtype="float64", mode="train"),
    tiny(causal=True, mode="train", batch=2),
    tiny(causal=True, seqlen_k=40),
    tiny(causal=True, seqlen_k=40, causal_alignment="top-left"),
    tiny(heads=4, heads_kv=2, mode="train", causal=True),
    tiny(heads=4, heads_kv=1, seqlen=1, seqlen_k=64, causal=True),
    tiny(window=(3, 2), mode="train"),
    tiny(window=(5, None), causal=True, seqlen_k=40),
    tiny(window=(5, 1), seqlen_k=40, causal_alignment="top-left"),
    tiny(mask="bool", mode="train"),
    tiny(mask="bool", causal=True, seqlen_k=40, dtype="bfloat16"),
    tiny(mask="additive", mode="train"),
    tiny(mask="additive", causal=True, dtype="float16"),
    dataclasses.replace(tiny(mode="train"), head_dim_v=24),
    ragged("tiny", (5, 12, 1, 30), dtype="float32", heads=2, head_dim=16, mode="train"),
    ragged("tiny", (5, 12, 1, 30), dtype="bfloat16", heads=2, head_dim=16, causal=True),
    unequal_lengths(causal=True, mode="train"),
    unequal_lengths(window=(4, 3)),
]


def name_of(case: Case) -> str:
    return case.name


# ---------------------------------------------------------------------------------- costs

BANDS = [
    *FEATURES,
    tiny(seqlen=40, seqlen_k=24, causal=True),
    tiny(seqlen=40, seqlen_k=24, window=(3, 0)),
    tiny(seqlen=40, seqlen_k=24, window=(3, 1), causal_alignment="top-left"),
    tiny(seqlen=40, seqlen_k=24, causal=True, causal_alignment="top-left"),
    tiny(seqlen=3, seqlen_k=40, window=(4, 0)),
    tiny(window=(None, 4)),
    tiny(window=(0, 0), batch=3),
]


def seen_by_the_rule(case: Case, seqlen_q: int, seqlen_k: int) -> list[list[bool]]:
    """Rule 2 of the design, literally, pair by pair."""
    left, right = case.window or (None, None)
    left = math.inf if left is None else left
    right = math.inf if right is None else right
    if case.causal:
        right = min(right, 0)
    offset = seqlen_k - seqlen_q if case.causal_alignment == "bottom-right" else 0
    return [[i + offset - left <= j <= i + offset + right for j in range(seqlen_k)] for i in range(seqlen_q)]


@pytest.mark.parametrize("case", BANDS, ids=name_of)
def test_pairs_and_keys_equal_a_count_of_every_pair(case: Case) -> None:
    tables = [seen_by_the_rule(case, *lengths) for lengths in case.sequences]
    assert costs.visible_pairs(case) == sum(sum(row) for table in tables for row in table)
    assert costs.keys_read(case) == sum(any(column) for table in tables for column in zip(*table, strict=True))


@pytest.mark.parametrize("case", BANDS, ids=name_of)
def test_hidden_pairs_follow_the_rule(case: Case) -> None:
    for lengths in case.sequences:
        seen = torch.tensor(seen_by_the_rule(case, *lengths))
        hidden = hidden_pairs(case, *lengths, None, CPU)
        assert torch.equal(seen, torch.ones_like(seen) if hidden is None else ~hidden)


def test_flops_equal_what_torch_counts() -> None:
    case = dataclasses.replace(tiny(batch=2, heads=4, heads_kv=2, seqlen_k=40, mode="train"), head_dim_v=24)
    data = make_data(case, CPU)
    with FlopCounterMode(display=False) as forward:
        out = rivals.eager_attention(data.q, data.k, data.v, None, None)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out, (data.q, data.k, data.v), data.dout)
    assert costs.forward_flops(case) == forward.get_total_flops()
    # Eager keeps the probabilities; a fused backward computes q k^T once more.
    recomputed = 2 * case.batch * case.heads_q * case.seqlen_q * case.seqlen_k * case.head_dim
    assert costs.backward_flops(case) == backward.get_total_flops() + recomputed
    assert costs.flops(case) == costs.forward_flops(case) + costs.backward_flops(case)


def test_backward_costs_two_and_a_half_forwards_for_equal_head_dims() -> None:
    case = tiny(causal=True, mode="train")
    assert costs.backward_flops(case) == 2.5 * costs.forward_flops(case)
    assert costs.flops(tiny(causal=True)) == costs.forward_flops(case)


@pytest.mark.parametrize(
    "case",
    [
        tiny(),
        tiny(dtype="bfloat16", mask="additive"),
        tiny(mask="bool", heads=4, heads_kv=2),
        unequal_lengths(),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_bytes_are_those_of_the_tensors(case: Case, mode: str) -> None:
    case = dataclasses.replace(case, mode=mode, head_dim_v=24)
    data = make_data(case, CPU)
    read = sum(x.nbytes for x in (data.q, data.k, data.v, data.mask, data.bias) if x is not None)
    (out, *_) = rivals.Fastattn().prepare(case, data)()
    if mode == "forward":
        assert costs.bytes_moved(case) == read + out.nbytes
        return
    lse = 4 * out.numel() // case.head_dim_v
    gradients = data.q.nbytes + data.k.nbytes + data.v.nbytes
    assert costs.forward_bytes(case) == read + out.nbytes + lse
    assert costs.backward_bytes(case) == read + 2 * out.nbytes + lse + gradients
    assert costs.bytes_moved(case) == costs.forward_bytes(case) + costs.backward_bytes(case)


def test_keys_out_of_the_window_are_not_counted_as_read() -> None:
    step = tiny(seqlen=1, seqlen_k=100, window=(9, 0))
    assert costs.keys_read(step) == 10
    assert costs.forward_bytes(step) == 4 * 2 * 16 * (1 + 10 + 10 + 1)


# ---------------------------------------------------------------------------------- cases and suites


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, float64, got 'int8'"),
        ({"mode": "backward"}, "mode must be one of forward, train, got 'backward'"),
        ({"mask": "causal"}, "mask must be one of none, bool, additive, got 'causal'"),
        ({"causal_alignment": "left"}, "causal_alignment must be one of bottom-right, top-left, got 'left'"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"heads_q": 3, "heads_kv": 2}, "heads_q must be a multiple of heads_kv, got 3 and 2"),
        ({"lengths_q": (24,)}, "lengths_q and lengths_k go together"),
        ({"lengths_q": (24,), "lengths_k": (24, 3)}, r"lengths_k must hold 1 lengths from 1 to exactly 24"),
        ({"lengths_q": (23,), "lengths_k": (24,)}, r"lengths_q must hold 1 lengths from 1 to exactly 24"),
        ({"lengths_q": (24,), "lengths_k": (24,), "mask": "bool"}, "mask must be 'none' when lengths_q"),
    ],
)
def test_a_case_refuses_what_is_no_call(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny(), **changes)


def test_names_tell_the_cases_of_a_suite_apart() -> None:
    for cases in SUITES.values():
        assert len({(case.family, case.name) for case in cases}) == len(cases)


@pytest.mark.parametrize("case", [*FEATURES, *SUITES["all"], *SUITES["sweep60"]], ids=name_of)
def test_a_case_survives_json(case: Case) -> None:
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


def test_sweep60_covers_the_range() -> None:
    cases = SUITES["sweep60"]
    assert len(set(cases)) >= 60
    assert {(case.mode, case.dtype) for case in cases} == set(
        itertools.product(("forward", "train"), ("float32", "bfloat16", "float16"))
    )
    for field, low, high in (
        ("batch", 1, 8),
        ("heads_q", 1, 32),
        ("seqlen_k", 1, 4096),
        ("head_dim", 32, 256),
    ):
        values = [getattr(case, field) for case in cases]
        assert (min(values), max(values)) == (low, high)


def test_the_suites_hold_the_cases_that_every_kernel_is_judged_by() -> None:
    dtypes = ("float32", "bfloat16", "float16")
    for mode, causal, head_dim, seqlen, dtype in itertools.product(
        ("forward", "train"), (False, True), (64, 128), (1024, 2048), dtypes
    ):
        family = f"{mode}-{'causal' if causal else 'full'}"
        case = Case(family, 1, 8, 8, seqlen, seqlen, head_dim, head_dim, dtype, mode=mode, causal=causal)
        assert case in SUITES[mode]
    for dtype in dtypes:
        assert Case("gqa-prefill", 1, 32, 8, 512, 512, 128, 128, dtype, causal=True) in SUITES["gqa"]
        assert Case("gqa-decode", 1, 32, 8, 1, 8192, 128, 128, dtype, cold=True) in SUITES["decode"]
        assert Case("decode", 1, 8, 8, 1, 8192, 128, 128, dtype, cold=True) in SUITES["decode"]
    assert all(case.window == (255, 0) and case.seqlen_q == 4096 for case in SUITES["window"])
    assert all(case.varlen for case in SUITES["varlen"])


# ---------------------------------------------------------------------------------- rivals and gate


def verdict_on(rival: rivals.Rival, case: Case) -> Any:
    data = make_data(case, CPU)
    return check(expect(case, data), rival.prepare(case, data)())


def is_right_if_willing(rival: rivals.Rival, case: Case) -> None:
    data = make_data(case, CPU)
    reason = rival.why_not(case, data)
    if reason is not None:
        pytest.skip(reason)
    verdict = check(expect(case, data), rival.prepare(case, data)())
    assert verdict.right, verdict.problems
    assert list(verdict.errors) == (["out", "dq", "dk", "dv"] if case.train else ["out"])


@pytest.mark.parametrize("case", FEATURES, ids=name_of)
@pytest.mark.parametrize(
    "rival",
    [rivals.Fastattn(), *map(rivals.Fastattn, fastattn.available_backends()), rivals.Sdpa(), rivals.Eager()],
    ids=lambda rival: rival.name,
)
def test_every_rival_computes_every_feature(rival: rivals.Rival, case: Case) -> None:
    is_right_if_willing(rival, case)


# On the CPU FlexAttention has no backward and no float64.
@pytest.mark.parametrize("case", [c for c in FEATURES if not c.train and c.dtype != "float64"], ids=name_of)
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_flex_attention_is_told_every_feature(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    # Compiling takes seconds for each shape, and the masks and layouts made here are the same without.
    monkeypatch.setattr(rivals_extra, "_compiled_flex", lambda _: flex_attention)
    is_right_if_willing(rivals_extra.Flex(), case)


class Spoiled(rivals.Rival):
    """fastattn's own result, or its call, with something done to it."""

    name = "spoiled"

    def __init__(
        self,
        spoil: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda results: results,
        **changed_options: Any,
    ) -> None:
        self._spoil, self._changed = spoil, changed_options

    def forward(self, case: Case, data: Data) -> Callable[[], Tensor]:
        arguments = {**options(case, data), **self._changed}
        return lambda: fastattn.attention(data.q, data.k, data.v, **arguments)

    def prepare(self, case: Case, data: Data) -> rivals.Call:
        call = super().prepare(case, data)
        return lambda: self._spoil(call())


def poke(position: int, value: float) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Changes one number of one output."""

    def spoil(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = [x.detach().clone() for x in found]
        changed[position].view(-1)[7] = value
        return tuple(changed)

    return spoil


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("spoiled", "complaint"),
    [
        (Spoiled(causal=False), "out is off by"),
        (Spoiled(scale=0.2), "out is off by"),
        (Spoiled(causal=False, window=(None, 1)), "out is off by"),
        (Spoiled(causal_alignment="top-left"), "out is off by"),
        (Spoiled(poke(0, math.nan)), "out is off by inf"),
        (Spoiled(poke(1, 3.0)), "dq is off by"),
        (Spoiled(poke(2, -math.inf)), "dk is off by inf"),
        (Spoiled(lambda x: (*x[:3], 1.1 * x[3])), "dv is off by"),
        (Spoiled(lambda x: (x[0][:, :, 1:], *x[1:])), "out has shape"),
        (Spoiled(lambda x: x[:1]), "1 outputs instead of 4"),
    ],
)
def test_the_gate_refuses_a_wrong_result(spoiled: Spoiled, complaint: str, dtype: str) -> None:
    case = tiny(causal=True, seqlen=24, seqlen_k=40, mode="train", dtype=dtype)
    assert verdict_on(Spoiled(), case).right
    verdict = verdict_on(spoiled, case)
    assert not verdict.right
    assert any(complaint in problem for problem in verdict.problems)


@pytest.mark.parametrize(
    ("result", "wanted", "error"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([math.nan, 2.0], [math.nan, 2.0], 0.0),
        ([math.inf, 2.0], [math.inf, 1.0], 1.0),
        ([math.inf], [-math.inf], math.inf),
        ([math.nan], [math.inf], math.inf),
        ([1.0], [math.nan], math.inf),
        ([], [], 0.0),
    ],
)
def test_max_error_compares_nan_and_infinities_by_place(result: list[float], wanted: list[float], error: float) -> None:
    assert max_error(torch.tensor(result), torch.tensor(wanted, dtype=torch.float64)) == error


def test_limits_are_twice_eagers_error_and_a_floor() -> None:
    case = tiny(dtype="bfloat16")
    data = make_data(case, CPU)
    exact = fastattn.reference.attention(*(x.double() for x in data[:3]))
    eager = rivals.eager_attention(data.q, data.k, data.v, None, None)
    limit = expect(case, data)["out"].limit
    # The gate runs eager attention head by head, whose rounding may differ a little.
    assert limit == pytest.approx(2 * max_error(eager, exact) + 2e-2 * exact.abs().max().item(), rel=0.1)


def fake_flash_attn(log: list[dict[str, Any]]) -> SimpleNamespace:
    """The documented signatures of flash-attn, computed by fastattn."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]) -> Tensor:
        log.append({"shape": q.shape, "causal": causal, "window_size": window_size})
        window = tuple(None if side < 0 else side for side in window_size)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return fastattn.attention(q, k, v, causal=causal, window=window).transpose(1, 2)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        causal: bool,
        window_size: tuple[int, int],
    ) -> Tensor:
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert max_seqlen_k == int(cu_seqlens_k.diff().max())
        log.append({"shape": q.shape, "causal": causal, "window_size": window_size})
        window = tuple(None if side < 0 else side for side in window_size)
        return fastattn.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, window=window)

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize(
    ("case", "shape", "window_size"),
    [
        (tiny(dtype="bfloat16"), (1, 24, 2, 16), (-1, -1)),
        (tiny(dtype="float16", causal=True, seqlen_k=40, mode="train"), (1, 24, 2, 16), (-1, 0)),
        (tiny(dtype="bfloat16", heads=4, heads_kv=2, window=(5, 2)), (1, 24, 4, 16), (5, 2)),
        (dataclasses.replace(unequal_lengths(causal=True), dtype="bfloat16"), (18, 2, 16), (-1, 0)),
    ],
)
def test_flash_attn_is_called_as_documented(
    case: Case, shape: tuple[int, ...], window_size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn(log))
    assert verdict_on(rivals_extra.FlashAttn(), case).right
    assert log == [{"shape": torch.Size(shape), "causal": case.causal, "window_size": window_size}]


def fake_xformers() -> SimpleNamespace:
    """The documented signature of xformers.ops.memory_efficient_attention, computed by fastattn."""
    top_left, bottom_right = type("TopLeft", (), {}), type("BottomRight", (), {})

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, *, attn_bias: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if isinstance(attn_bias, Tensor):
            assert attn_bias.shape == (*q.shape[:3], k.shape[2])
            return fastattn.attention(q, k, v, bias=attn_bias).transpose(1, 2)
        alignment = "top-left" if isinstance(attn_bias, top_left) else "bottom-right"
        out = fastattn.attention(q, k, v, causal=attn_bias is not None, causal_alignment=alignment)
        return out.transpose(1, 2)

    masks = SimpleNamespace(LowerTriangularMask=top_left, LowerTriangularFromBottomRightMask=bottom_right)
    return SimpleNamespace(memory_efficient_attention=memory_efficient_attention, fmha=SimpleNamespace(attn_bias=masks))


@pytest.mark.parametrize(
    "case",
    [
        tiny(dtype="bfloat16", mode="train"),
        tiny(dtype="bfloat16", causal=True),
        tiny(dtype="float16", causal=True, seqlen_k=40),
        tiny(dtype="float16", causal=True, seqlen_k=40, causal_alignment="top-left"),
        tiny(dtype="bfloat16", mask="additive", batch=2),
    ],
    ids=name_of,
)
def test_xformers_is_called_as_documented(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = fake_xformers()
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    assert verdict_on(rivals_extra.Xformers(), case).right


@pytest.mark.parametrize(
    ("rival", "case", "sentence"),
    [
        (rivals_extra.FlashAttn(), tiny(mask="bool"), "no dense mask"),
        (rivals_extra.FlashAttn(), tiny(head_dim=320), "head_dim <= 256"),
        (
            rivals_extra.FlashAttn(),
            tiny(causal=True, seqlen_k=40, causal_alignment="top-left"),
            "bottom-right only",
        ),
        (rivals_extra.Xformers(), tiny(heads=4, heads_kv=2), "no grouped heads"),
        (rivals_extra.Xformers(), tiny(window=(3, 3)), "dense cases only"),
        (rivals_extra.Xformers(), tiny(mask="additive", causal=True), "dense cases only"),
    ],
)
def test_gpu_packages_say_what_they_cannot_do(
    rival: rivals.Rival, case: Case, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(case, CPU)
    assert rival.why_not(case, data) is not None  # not installed, or no CUDA device
    monkeypatch.setattr(rivals_extra, "_why_no_gpu_package", lambda *_: None)
    assert sentence in (rival.why_not(case, data) or "")
    assert rival.why_not(tiny(causal=True), data) is None


@pytest.mark.parametrize(
    ("package", "dtype", "sentence"),
    [
        ("no_such_package", "bfloat16", "no_such_package is not installed"),
        ("torch", "bfloat16", "torch runs on CUDA devices only"),
    ],
)
def test_gpu_packages_say_where_they_run(package: str, dtype: str, sentence: str) -> None:
    case = tiny(dtype=dtype)
    assert sentence in (rivals_extra._why_no_gpu_package(package, case, make_data(case, CPU)) or "")


def test_a_named_backend_gives_fastattns_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny()
    data = make_data(case, CPU)
    assert rivals.Fastattn("reference").why_not(case, data) is None

    def refuse(*_: Tensor, backend: str, **__: Any) -> None:
        raise ValueError(f"backend {backend!r} cannot compute this call: too tiny")

    monkeypatch.setattr(fastattn, "explain", refuse)
    assert rivals.Fastattn("reference").why_not(case, data) == (
        "backend 'reference' cannot compute this call: too tiny"
    )
    assert rivals.Fastattn().why_not(case, data) is None


def test_eager_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny(mode="train")
    data = make_data(case, CPU)
    assert rivals.Eager().why_not(case, data) is None
    monkeypatch.setattr(rivals, "free_memory", lambda _: 6 * 2 * 24 * 24 * 4 - 1)
    assert "are free" in (rivals.Eager().why_not(case, data) or "")


# ---------------------------------------------------------------------------------- timing and memory


class ScriptedClock:
    """Runs each call and says that it took what the script says."""

    name = "scripted"

    def __init__(self, seconds: float = 1.0, shortest_sample: float = 0.0, waits: Sequence[float] = ()) -> None:
        self._seconds, self.shortest_sample = seconds, shortest_sample
        self._waits = itertools.chain.from_iterable(itertools.pairwise(waits))
        self.repeats: list[int] = []

    def seconds(self, call: timing.Thunk, repeats: int) -> float:
        call()
        self.repeats.append(repeats)
        return self._seconds

    def waited(self) -> float:
        """Before and after each round."""
        return next(self._waits, 0.0)


def test_rounds_are_interleaved() -> None:
    log: list[str] = []
    calls = {name: lambda name=name: log.append(name) for name in "ABC"}
    samples = interleave(calls, ScriptedClock(), Effort(budget=0.0, min_rounds=4))
    assert "".join(log) == "ABC" + 4 * "ABC"  # the first round warms up
    assert samples == timing.Samples({name: [1.0] * 4 for name in "ABC"}, dropped=0, quiet=True)


def test_rounds_go_on_until_the_budget_is_spent_or_there_are_enough() -> None:
    calls = {"A": lambda: None}
    assert len(interleave(calls, ScriptedClock(), Effort(budget=math.inf, max_rounds=17)).seconds["A"]) == 17
    slow = timing.WallClock()
    event = iter(range(1000))
    calls = {"A": lambda: torch.randn(100_000).sum() + next(event)}
    spent = interleave(calls, slow, Effort(budget=0.05, min_rounds=1, max_rounds=10**6)).seconds["A"]
    assert 1 < len(spent) < 1000


def test_disturbed_rounds_are_dropped() -> None:
    numbers = itertools.count()
    clock = ScriptedClock(waits=[0.0, 0.0, 5.0, 5.0, 9.0, 9.0])  # rounds 2 and 4 of 5 had to wait
    clock.seconds = lambda call, repeats: float(next(numbers))  # type: ignore[method-assign]
    effort = Effort(budget=0.0, min_rounds=3, max_rounds=5)
    found = interleave({"A": lambda: None}, clock, effort._replace(budget=math.inf))
    assert found == timing.Samples({"A": [1.0, 3.0, 5.0]}, dropped=2, quiet=True)


def test_disturbed_rounds_are_kept_and_reported_where_too_few_were_quiet() -> None:
    clock = ScriptedClock(waits=[0.0, 1.0, 2.0, 2.0])
    found = interleave({"A": lambda: None}, clock, Effort(budget=0.0, min_rounds=3))
    assert found == timing.Samples({"A": [1.0] * 3}, dropped=0, quiet=False)
    table = report.Table([tiny()], ["fastattn"], PEAKS)
    result = CaseResult(tiny(), [measured("fastattn", [1.0], ours=True)], quiet=False)
    assert all(row.endswith(" ~") for row in table.rows(result))
    assert "~ 1 case disturbed" in "\n".join(report.summary_lines(Run({}, PEAKS, [result])))


def test_waiting_for_a_core_is_noticed() -> None:
    if not hasattr(os, "sched_setaffinity") or not Path("/proc/self/schedstat").exists():
        pytest.skip("this system does not tell how long a process waited")
    core = min(os.sched_getaffinity(0))
    pin = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    hog = subprocess.Popen([sys.executable, "-c", pin], stdout=subprocess.PIPE)
    cores = os.sched_getaffinity(0)
    try:
        assert hog.stdout is not None
        hog.stdout.readline()
        os.sched_setaffinity(0, {core})
        clock = timing.WallClock()
        before, end = clock.waited(), time.perf_counter() + 0.2
        while time.perf_counter() < end:
            pass
        assert clock.waited() - before > timing.MOST_WAITING * 0.2
    finally:
        os.sched_setaffinity(0, cores)
        hog.kill()
        hog.wait()


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = ScriptedClock(seconds=1e-4, shortest_sample=1e-3)
    interleave({"A": lambda: None}, clock, Effort(budget=0.0, min_rounds=2))
    assert clock.repeats == [1, 10, 10]


def test_the_wall_clock_gives_seconds_per_call() -> None:
    calls = []
    assert 0 < timing.WallClock().seconds(lambda: calls.append(0), 1000) < 1e-3
    assert len(calls) == 1000


def test_cold_copies_exceed_the_cache_and_hold_the_same_values() -> None:
    case = tiny(seqlen=1, seqlen_k=64, cold=True)
    copies = make_cold_data(case, CPU, cache_bytes=100_000)
    kv_bytes = copies[0].k.nbytes + copies[0].v.nbytes
    assert (len(copies) - 1) * kv_bytes >= 2 * 100_000 > (len(copies) - 2) * kv_bytes
    assert len({data.k.data_ptr() for data in copies} | {data.v.data_ptr() for data in copies}) == 2 * len(copies)
    assert all(torch.equal(data.k, copies[0].k) and torch.equal(data.v, copies[0].v) for data in copies)


def test_cold_copies_are_taken_in_turn_over_all_rivals() -> None:
    log: list[tuple[str, int]] = []

    def prepared(name: str) -> list[rivals.Call]:
        return [lambda i=i: log.append((name, i)) for i in range(3)]  # type: ignore[misc]

    first, second = harness.in_turn([prepared("A"), prepared("B")])
    for _ in range(3):
        first()
        second()
    assert log == [("A", 0), ("B", 1), ("A", 2), ("B", 0), ("A", 1), ("B", 2)]


def test_peak_memory_is_that_of_the_call() -> None:
    if memory.method(CPU) is None:
        pytest.skip("this system has no way to reset the peak")

    def call() -> Tensor:
        scratch = torch.ones(2**24)  # 64 MiB, freed before the call ends
        return scratch.sum()

    for _ in range(2):  # what the first run freed counts again in the second
        peak = memory.peak_bytes(call, CPU)
        assert peak is not None
        assert 63 * 2**20 <= peak <= 80 * 2**20
    nothing = memory.peak_bytes(lambda: None, CPU)
    assert nothing is not None
    assert nothing < 2**20


def test_memory_is_not_made_up_where_it_cannot_be_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert memory.method(CPU) is None
    assert memory.peak_bytes(lambda: None, CPU) is None


def test_peaks_are_measured_for_the_dtypes_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = peaks.measure_peaks(CPU, ["bfloat16"], runs=1, matmul_size=128)
    assert set(found.flops) == {"bfloat16", "float32"}
    assert min(*found.flops.values(), found.read_bandwidth, found.copy_bandwidth) > 1e8
    assert found.buffer_bytes >= 4 * (machine.last_level_cache() or 0)
    busy = ScriptedClock(waits=range(99))
    monkeypatch.setattr(peaks, "clock_for", lambda _: busy)
    assert not peaks.measure_peaks(CPU, [], runs=1, matmul_size=128).quiet
    assert PEAKS.flops_ceiling("float16") == 2e11
    assert PEAKS.flops_ceiling("bfloat16") == 4e11


# ---------------------------------------------------------------------------------- harness and results


class Broken(rivals.Rival):
    """Raises an error that wraps another, as compilers do."""

    name = "broken"

    def forward(self, case: Case, data: Data) -> Callable[[], Tensor]:
        raise RuntimeError("compilation failed\n in line 3") from NotImplementedError("no backward here\nat all")


class Unwilling(rivals.Rival):
    name = "unwilling"

    def why_not(self, case: Case, data: Data) -> str | None:
        return "it is Sunday"

    def forward(self, case: Case, data: Data) -> Callable[[], Tensor]:
        raise AssertionError("must not be asked")


def test_only_right_results_are_timed_and_the_others_say_why() -> None:
    entrants: Sequence[rivals.Rival] = (
        rivals.Fastattn(),
        Spoiled(causal=False),
        Broken(),
        Unwilling(),
        rivals.Sdpa(),
    )
    case = tiny(causal=True)
    (result,) = harness.run_cases([case], entrants, CPU, BRIEF)
    found = {m.rival: m for m in result.measurements}
    assert {name: m.status for name, m in found.items()} == {
        "fastattn": RAN,
        "spoiled": WRONG,
        "broken": FAILED,
        "unwilling": SKIPPED,
        "sdpa": RAN,
    }
    assert [len(found[name].seconds) for name in ("fastattn", "spoiled", "broken", "sdpa")] == [3, 0, 0, 3]
    assert found["spoiled"].reason.startswith("out is off by")
    assert found["broken"].reason == "NotImplementedError: no backward here"
    assert found["unwilling"].reason == "it is Sunday"
    assert result.ratio(found["fastattn"]) == 1.0
    assert result.ratio(found["spoiled"]) is None


def test_a_cold_case_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "last_level_cache", lambda: 50_000)
    case = tiny(seqlen=1, seqlen_k=64, cold=True)
    result = harness.run_case(case, [rivals.Fastattn(), rivals.Sdpa()], CPU, BRIEF, timing.WallClock())
    assert [m.status for m in result.measurements] == [RAN, RAN]


def measured(rival: str, seconds: list[float], *, ours: bool = False) -> Measurement:
    return Measurement(rival, ours, RAN, errors={"out": 1e-7}, seconds=seconds, peak_bytes=2**20)


def sample_run() -> Run:
    """Two lengths and a case in which one rival was wrong, with made-up times."""
    ours = {"fastattn": ([1.0, 2.0, 4.0], [2.0, 2.0, 2.0], [1.0, 1.0, 1.0])}
    theirs = {
        "sdpa": ([2.0, 2.0, 12.0], [1.0, 1.0, 1.0], [3.0, 3.0, 3.0]),
        "eager": ([4.0, 8.0, 16.0], [4.0, 4.0, 4.0], None),
    }
    cases = [tiny(seqlen=16), tiny(seqlen=32), tiny(seqlen=16, causal=True)]
    found = []
    for number, case in enumerate(cases):
        measurements = [measured("fastattn", ours["fastattn"][number], ours=True)]
        for name, seconds in theirs.items():
            if seconds[number] is None:
                measurements.append(Measurement(name, False, WRONG, "out is off by 1", {"out": 1.0}))
            else:
                measurements.append(measured(name, seconds[number]))
        measurements.append(Measurement("xformers", False, SKIPPED, "not installed"))
        found.append(CaseResult(case, measurements, dropped_rounds=number))
    facts = machine.header(CPU) | {"clock": "wall time", "memory_method": None}
    return Run(facts, PEAKS, found)


def test_statistics_are_what_their_names_say() -> None:
    run = sample_run()
    first = run.results[0]
    ours, sdpa = first.measurements[:2]
    assert (ours.median, ours.quartiles) == (2.0, (1.5, 3.0))
    assert measured("one", [5.0]).quartiles == (5.0, 5.0)
    # Per round 2/1, 2/2 and 12/4: the median of the ratios, not the ratio of the medians (2/2).
    assert first.ratio(sdpa) == 2.0
    assert run.geometric_means() == {
        ("tiny", "sdpa"): (pytest.approx((2.0 * 0.5 * 3.0) ** (1 / 3)), 3),
        ("tiny", "eager"): (pytest.approx((4.0 * 2.0) ** 0.5), 2),
    }
    assert [(found.case, found.rival, found.ratio) for found in run.worst(2)] == [
        (run.results[1].case, "sdpa", 0.5),
        (run.results[0].case, "sdpa", 2.0),
    ]
    assert run.failures() == []


def test_ratios_compare_with_the_first_of_ours_that_ran() -> None:
    failed = Measurement("fastattn:cpu", True, FAILED, "RuntimeError: no")
    ours, theirs = measured("fastattn:reference", [2.0], ours=True), measured("sdpa", [3.0])
    result = CaseResult(tiny(), [failed, ours, theirs])
    assert result.ratio(theirs) == 1.5
    assert Run({}, PEAKS, [result]).failures() == [(tiny(), failed)]
    assert CaseResult(tiny(), [failed, theirs]).ratio(theirs) is None


def test_a_run_survives_json(tmp_path: Path) -> None:
    run = sample_run()
    run.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == run
    document = json.loads((tmp_path / "run.json").read_text())
    first = document["results"][0]
    assert first["flops"] == costs.flops(run.results[0].case)
    assert first["bytes"] == costs.bytes_moved(run.results[0].case)
    assert first["rivals"][1]["ratio"] == 2.0
    assert first["rivals"][1]["seconds"] == [2.0, 2.0, 12.0]
    with pytest.raises(ValueError, match="expected a benchmark document of format 1, got 7"):
        Run.from_json({"format": 7})
    assert results.FORMAT == 1


# ---------------------------------------------------------------------------------- header, report and plot


def test_the_header_tells_machine_and_versions() -> None:
    facts = machine.header(CPU)
    assert facts["torch"] == torch.__version__
    assert facts["fastattn"] == fastattn.__version__
    assert facts["python"] == sys.version.split()[0]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores"] >= 1
    assert facts["gpu"] is None
    json.dumps(facts)
    text = "\n".join(report.header_lines(facts | {"clock": "wall time", "memory_method": None}, PEAKS))
    for words in (
        str(facts["cpu"]),
        torch.__version__,
        f"{facts['threads']} threads",
        "not measured",
        facts["date"],
    ):
        assert words in text
    assert "float32 200, bfloat16 400" in text
    assert "too low" not in text
    disturbed = dataclasses.replace(PEAKS, quiet=False)
    assert "too low" in "\n".join(report.header_lines(facts | {"clock": "wall time", "memory_method": None}, disturbed))


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    tracked, untracked = tmp_path / "tracked.py", tmp_path / "untracked.py"
    tracked.write_text("1\n")
    git("add", "tracked.py")
    git("commit", "-q", "-m", "first")
    untracked.write_text("2\n")
    commit = git("rev-parse", "HEAD")
    assert machine.git_state(tracked) == (commit, False)
    assert machine.git_state(untracked) == (None, None)
    tracked.write_text("3\n")
    assert machine.git_state(tracked) == (commit, True)


def test_the_table_is_aligned_and_gives_no_speed_to_the_wrong() -> None:
    run = sample_run()
    table = report.Table([result.case for result in run.results], ["fastattn", "sdpa", "eager"], PEAKS)
    head = table.head()
    rows = [row for result in run.results for row in table.rows(result)]
    timed, wrong = [row for row in rows if "wrong" not in row], [row for row in rows if "wrong" in row]
    assert {len(row) for row in timed} == {len(head)}
    assert [row.split("wrong: ")[1] for row in wrong] == ["out is off by 1"]
    # 2 heads, 16 x 16 pairs, head_dim 16, in 2 s.
    assert costs.flops(run.results[0].case) == 2 * 2 * 2 * 16 * 16 * 16
    assert timed[0].split()[-9:] == [
        "fastattn",
        "2000.0",
        "1500.0-3000.0",
        "1.00",
        "0.0",
        "0%",
        "0.00",
        "0%",
        "1.0",
    ]
    assert not any("xformers" in row for row in rows)


def test_the_table_prints_rates_and_shares() -> None:
    case = dense("tiny", seqlen=1024, dtype="bfloat16")
    table = report.Table([case], ["fastattn"], PEAKS)
    (row,) = table.rows(CaseResult(case, [measured("fastattn", [1e-2], ours=True)]))
    # 4 * 8 * 1024^2 * 64 operations and 4 * 8 * 1024 * 64 * 2 bytes in 10 ms, of 400 GFLOP/s and 30 GB/s.
    assert row.split()[-5:] == ["214.7", "54%", "0.42", "1%", "1.0"]


def test_the_summary_names_means_worst_cases_and_what_did_not_run() -> None:
    run = sample_run()
    run.results[0].measurements[0] = Measurement("fastattn", True, WRONG, "out is off by 3", {"out": 3.0})
    lines = list(report.summary_lines(run))
    assert any(line.split() == ["tiny", "sdpa", "1.22", "(2", "cases)"] for line in lines)
    assert any(line.split()[:2] == ["0.500", "sdpa"] for line in lines)
    assert "  xformers, 3 cases: not installed" in lines
    assert lines[-1] == f"FAILED: fastattn wrong on tiny: {run.results[0].case.name}: out is off by 3"


def test_the_plot_is_a_picture_with_a_curve_for_each_rival(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    plot(sample_run(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = torch.from_numpy(image.imread(tmp_path / "plot.png"))[..., :3]
    assert min(pixels.shape[:2]) > 500
    for color in ("0072B2", "D55E00", "009E73"):
        rgb = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        assert ((pixels - rgb).abs().amax(dim=-1) < 0.01).sum() > 200


def test_a_plot_needs_two_lengths(tmp_path: Path) -> None:
    run = sample_run()
    del run.results[0]
    assert not has_curves([result.case for result in run.results])
    with pytest.raises(ValueError, match="there is nothing to plot"):
        plot(run, tmp_path / "plot.png")
    assert has_curves(SUITES["quick"])


# ---------------------------------------------------------------------------------- CLI

TINY_SUITES = {
    "quick": [tiny(seqlen=16), tiny(seqlen=32), tiny(seqlen=16, dtype="bfloat16")],
    "long": [dense("long", seqlen=64, dtype="float32", causal=True)],
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line on tiny suites, on a machine whose ceilings are known."""
    monkeypatch.setattr(cli, "SUITES", TINY_SUITES)
    monkeypatch.setattr(cli, "measure_peaks", lambda *_: PEAKS)

    def run(*arguments: str) -> int:
        parser = argparse.ArgumentParser()
        cli.add_arguments(parser)
        return cli.run(parser.parse_args(arguments))

    return run


def test_the_command_prints_saves_and_plots(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    saved, picture = tmp_path / "run.json", tmp_path / "plot.png"
    arguments = ("--budget", "0.01", "--threads", "2", "--backend", "auto,reference", "--json", str(saved))
    assert command(*arguments, "--plot", str(picture)) == cli.OK
    assert torch.get_num_threads() == threads
    assert picture.stat().st_size > 10_000
    run = Run.load(saved)
    assert [result.case for result in run.results] == TINY_SUITES["quick"]
    assert run.header["threads"] == 2
    statuses = {m.rival: m.status for m in run.results[0].measurements}
    assert [name for name, status in statuses.items() if status == RAN] == [
        "fastattn",
        "fastattn:reference",
        "sdpa",
        "eager",
    ]
    printed = capsys.readouterr().out
    for words in (
        "geometric mean of the ratios",
        "worst cases",
        "not run",
        "tiny: forward B1 H2 S16 D16 float32",
    ):
        assert words in printed


@pytest.mark.parametrize(
    ("arguments", "cases"),
    [
        (("--suite", "long"), TINY_SUITES["long"]),
        (("--suite", "long,quick"), TINY_SUITES["long"] + TINY_SUITES["quick"]),
        (("--family", "long"), TINY_SUITES["long"]),
        (("--dtype", "bfloat16"), TINY_SUITES["quick"][2:]),
    ],
)
def test_the_command_chooses_cases(
    command: Callable[..., int], tmp_path: Path, arguments: tuple[str, ...], cases: list[Case]
) -> None:
    saved = tmp_path / "run.json"
    assert command(*arguments, "--budget", "0.001", "--rivals", "none", "--json", str(saved)) == cli.OK
    assert [result.case for result in Run.load(saved).results] == cases


def test_a_wrong_result_of_fastattn_fails_the_run(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attention = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *x, **options: 1.1 * attention(*x, **options))
    assert command("--suite", "long", "--budget", "0.001") == cli.WRONG_RESULT
    assert "FAILED: fastattn wrong on long: forward B1 H8 S64 D64 float32 causal" in capsys.readouterr().out


def test_a_wrong_rival_does_not_fail_the_run(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rivals, "scaled_dot_product_attention", lambda q, k, v, **_: q)
    assert command("--suite", "long", "--rivals", "sdpa", "--budget", "0.001") == cli.OK
    assert "wrong: out is off by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--suite", "fast"), "--suite knows quick, long; got 'fast'"),
        (("--family", "fast"), "--family knows tiny, long; got 'fast'"),
        (("--suite", "quick", "--family", "long"), "--family knows tiny; got 'long'"),
        (("--dtype", "int8"), "--dtype knows all, float32, bfloat16, float16, float64; got 'int8'"),
        (("--dtype", "float64"), "--dtype float64 leaves no case of those chosen"),
        (("--backend", "gpu"), f"--backend knows all, auto, {BACKENDS}; got 'gpu'"),
        (
            ("--rivals", "sdpa,keras"),
            "--rivals knows all, sdpa, eager, flex, flash-attn, xformers; got 'keras'",
        ),
        (("--device", "tpu"), "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (("--device", "meta"), "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (("--device", "cuda:99"), "--device cuda:99 does not exist"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--budget", "-1"), "--budget must be more than 0 seconds, got -1.0"),
        (("--budget", "nan"), "--budget must be more than 0 seconds, got nan"),
        (("--json", "missing_folder/x.json"), "--json names a file in a folder that does not exist"),
        (
            ("--suite", "long", "--plot", "x.png"),
            "--plot needs cases that differ in the sequence length alone",
        ),
    ],
)
def test_bad_values_give_a_sentence(
    command: Callable[..., int], arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == cli.BAD_ARGUMENT
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.out == ""


def test_the_list_names_every_suite_rival_and_backend() -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--list"], cwd=root, capture_output=True, text=True, check=True
    )
    for suite, cases in SUITES.items():
        assert f"{suite} ({len(cases)} cases)" in done.stdout
    for case in SUITES["sweep60"]:
        assert f"  sweep60: {case.name}\n" in done.stdout
    assert "rivals: sdpa, eager, flex, flash-attn, xformers" in done.stdout
    assert f"backends: auto, {BACKENDS}" in done.stdout
