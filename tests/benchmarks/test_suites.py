"""The suites hold the cases they promise."""

from __future__ import annotations

import itertools

from benchmarks.cases import Case
from benchmarks.suites import SUITES


def test_names_tell_the_cases_of_a_suite_apart() -> None:
    for cases in SUITES.values():
        assert len({(case.family, case.name) for case in cases}) == len(cases)


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
