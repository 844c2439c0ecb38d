"""Random combinations of everything, against the float64 oracle; the same examples in every run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from . import cache_cases, cases
from .cache_cases import CacheCase
from .cases import Case
from .conftest import REFUSED_DTYPES
from .test_backward import check as check_backward
from .test_forward import check as check_forward
from .test_kv_cache import check as check_cache

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.complete]


def budget(examples: int) -> settings:
    """Fixtures of this module are constant, so sharing them among examples is harmless."""
    shared = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=shared)


dtypes = st.sampled_from(cases.DTYPES)
sizes = st.integers(0, 13)
head_dims = st.integers(0, 20)
windows = st.none() | st.tuples(st.none() | st.integers(0, 9), st.none() | st.integers(0, 9))
layouts = st.sampled_from(["bhsd", "bshd", "sbhd", "bhds", "expanded", "scattered", "padded rows"])
forms = st.none() | st.sampled_from(["bhqk", "b1qk", "1hqk", "b11k", "bhq1", "1h11", "hqk", "qk", "q1", "k", "1", ""])
offsets = st.integers(-300, 300)
heads = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda pair: (pair[0] * pair[1], pair[1]))


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """What dense and varlen calls have in common."""
    heads_q, heads_kv = draw(heads)
    return {
        "name": f"random {draw(st.integers(0, 10**6))}",
        "heads_q": heads_q,
        "heads_kv": heads_kv,
        "head_dim": draw(head_dims),
        "head_dim_v": draw(head_dims),
        "causal": draw(st.booleans()),
        "window": draw(windows),
        "causal_alignment": draw(st.sampled_from(["bottom-right", "top-left"])),
        "mask": draw(forms),
        "bias": draw(forms),
        "alibi": draw(st.sampled_from([None, "h", "bh"])),
        "softcap": draw(st.none() | st.floats(0.1, 30.0)),
        "sinks": draw(st.booleans()),
        "scale": draw(st.none() | st.floats(-1.0, 1.0)),
        "dropout_p": draw(st.just(0.0) | st.floats(0.01, 0.9)),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }


@st.composite
def dense(draw: st.DrawFn) -> Case:
    batch, seqlen_k = draw(st.integers(0, 3)), draw(sizes)
    lengths = draw(st.none() | st.tuples(*[st.integers(0, seqlen_k)] * batch))
    given_sizes = {"batch": batch, "seqlen_q": draw(sizes), "seqlen_k": seqlen_k, "kv_lengths": lengths}
    given_sizes["q_offset"] = draw(st.none() | st.tuples(*[offsets] * batch))
    return Case(**draw(options()), **given_sizes, layout=draw(layouts))


@st.composite
def varlen(draw: st.DrawFn) -> Case:
    lengths = tuple(draw(st.lists(st.tuples(sizes, sizes), max_size=4)))
    kv_lengths = draw(st.none() | st.tuples(*(st.integers(0, keys) for _, keys in lengths)))
    q_offset = draw(st.none() | st.tuples(*[offsets] * len(lengths)))
    spare = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    layout = draw(st.sampled_from(["bhsd", "htd", "scattered", "padded rows"]))
    return Case(
        **draw(options()), lengths=lengths, kv_lengths=kv_lengths, q_offset=q_offset, spare=spare, layout=layout
    )


@st.composite
def cached(draw: st.DrawFn) -> CacheCase:
    page_size = draw(st.integers(0, 5))
    capacity = draw(st.integers(0, 4)) * (page_size or 4)
    seqlen_new = draw(st.integers(0, min(capacity, 4)))
    lengths = tuple(draw(st.lists(st.integers(0, capacity - seqlen_new), max_size=3)))
    heads_q, heads_kv = draw(heads)
    head_dim = draw(head_dims)
    rotary_dim = 2 * draw(st.integers(0, head_dim // 2))
    positions = offsets.map(abs) if rotary_dim else offsets  # a table has no position before the first
    return CacheCase(
        name=f"random {draw(st.integers(0, 10**6))}",
        lengths=lengths,
        seqlen_q=draw(st.integers(0, 5)),
        seqlen_new=seqlen_new,
        capacity=capacity,
        page_size=page_size,
        heads_q=heads_q,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=draw(head_dims),
        rotary_dim=rotary_dim,
        q_offset=draw(st.none() | st.tuples(*[positions] * len(lengths))),
        interleaved=draw(st.booleans()),
        causal=draw(st.booleans()),
        window=draw(windows),
        causal_alignment=draw(st.sampled_from(["bottom-right", "top-left"])),
        mask=draw(st.booleans()),
        bias=draw(st.booleans()),
        alibi=draw(st.booleans()),
        softcap=draw(st.none() | st.floats(0.1, 30.0)),
        sinks=draw(st.booleans()),
        scale=draw(st.none() | st.floats(-1.0, 1.0)),
        layout=draw(st.sampled_from(sorted(cache_cases.LAYOUTS))),
    )


@budget(150)
@given(case=dense(), dtype=dtypes)
def test_dense(backend: str, device: str, case: Case, dtype: torch.dtype) -> None:
    assume(dtype not in REFUSED_DTYPES.get(backend, ()))
    check_forward(case, dtype, backend, device)
    check_backward(case, dtype, backend, device)


@budget(80)
@given(case=varlen(), dtype=dtypes)
def test_varlen(backend: str, device: str, case: Case, dtype: torch.dtype) -> None:
    assume(dtype not in REFUSED_DTYPES.get(backend, ()))
    check_forward(case, dtype, backend, device)
    check_backward(case, dtype, backend, device)


@budget(80)
@given(case=cached(), dtype=dtypes)
def test_cache(backend: str, device: str, case: CacheCase, dtype: torch.dtype) -> None:
    assume(dtype not in REFUSED_DTYPES.get(backend, ()))
    check_cache(case, dtype, backend, device)
