"""Small cases of every feature, spoiled results, scripted times and a made-up run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastattn
from benchmarks import machine, peaks, rivals, timing
from benchmarks.cases import Case
from benchmarks.data import Data, make_data, options
from benchmarks.gate import check, expect
from benchmarks.measurements import RAN, SKIPPED, WRONG, CaseResult, Measurement, Run
from benchmarks.suites import dense, ragged

CPU = torch.device("cpu")
PEAKS = peaks.Peaks({"float32": 2e11, "bfloat16": 4e11, "float16": 1e10}, 2048, 3e10, 2e10, 2**28)


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


def name_of(case: Case) -> str:
    return case.name


def seen_by_the_rule(case: Case, seqlen_q: int, seqlen_k: int) -> list[list[bool]]:
    """Rule 2 of the design, literally, pair by pair."""
    left, right = case.window or (None, None)
    left = math.inf if left is None else left
    right = math.inf if right is None else right
    if case.causal:
        right = min(right, 0)
    offset = seqlen_k - seqlen_q if case.causal_alignment == "bottom-right" else 0
    return [[i + offset - left <= j <= i + offset + right for j in range(seqlen_k)] for i in range(seqlen_q)]


def verdict_on(rival: rivals.Rival, case: Case) -> Any:
    data = make_data(case, CPU)
    return check(expect(case, data), rival.prepare(case, data)())


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
