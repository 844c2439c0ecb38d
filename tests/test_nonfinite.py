"""NaN and infinities: those that a query sees show, those that none sees do not exist."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import fastattn

from . import oracle
from .cases import Call, Case, as_arrays, build, evaluate
from .tolerance import assert_close, to_numpy

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def results(call: Call, backend: str) -> list[Tensor]:
    """out, lse and all gradients, with fixed cotangents."""
    leaves = call.requires_grad()
    out, lse = call.run(return_lse=True, backend=backend)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in (out, lse)]
    return [out, lse, *torch.autograd.grad((out, lse), list(leaves.values()), cotangents)]


# --------------------------------------------------------------------------------------------------- visible: it shows


def with_nan_key(call: Call) -> None:
    call.k[:, :, 6] = torch.nan


def with_nan_query(call: Call) -> None:
    call.q[:, :, 4] = torch.nan


def with_nan_bias(call: Call) -> None:
    call.options["bias"][4, 6] = torch.nan


def with_infinite_bias(call: Call) -> None:
    call.options["bias"][4, 6] = torch.inf


def with_infinite_key(call: Call) -> None:
    call.k[:, :, 6, 0] = torch.inf


VISIBLE = {
    "q": with_nan_query,
    "k": with_nan_key,
    "bias": with_nan_bias,
    "inf bias": with_infinite_bias,
    "inf k": with_infinite_key,
}

# Options under which some rows do not see key 6.
BLINDERS = (
    {"causal": True},
    {"window": (2, 3)},
    {"causal": True, "sinks": True},
    {"causal": True, "softcap": 2.0},
    {"window": (2, 3), "alibi": "h", "dropout_p": 0.2},
)


@pytest.mark.parametrize("options", BLINDERS, ids=str)
@pytest.mark.parametrize("where", VISIBLE)
def test_visible_scores_propagate(where: str, options: dict, backend: str, device: str) -> None:
    """Exactly the rows that see the bad score are NaN; the others are as if it were not there."""
    call = build(Case("bad score", seqlen_q=9, seqlen_k=11, bias="qk", **options), torch.float32, device)
    VISIBLE[where](call)
    out, lse = call.run(return_lse=True, backend=backend)
    exact = evaluate(oracle, as_arrays(call))
    assert np.isfinite(exact.out).any()
    # softcap makes an infinite score finite again; everything else shows.
    assert np.isnan(exact.out).any() or (where == "inf k" and "softcap" in options)
    assert_close("out", out, exact.out, None, torch.float32)
    # An infinite score makes lse infinite in exact arithmetic and NaN in many; it must not be finite.
    finite = np.isfinite(exact.out).all(axis=-1)
    assert np.array_equal(np.isfinite(to_numpy(lse)), finite)
    assert_close("lse", lse[torch.from_numpy(finite)], exact.lse[finite], None, torch.float32)


def test_visible_values_propagate(backend: str, device: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 7, 8, device=device).unbind()
    v = v.clone()
    v[0, 0, 2, 5], v[0, 1, 3, 1] = torch.nan, torch.inf
    out = fastattn.attention(q, k, v, backend=backend)
    assert out.isnan().nonzero().tolist() == [[0, 0, i, 5] for i in range(7)]
    assert out.isinf().nonzero().tolist() == [[0, 1, i, 1] for i in range(7)]


def test_nan_seed_of_the_gradient_propagates(backend: str, device: str) -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 7, 8, device=device))
    dout = torch.zeros(1, 2, 7, 8, device=device)
    dout[0, 0, 3] = torch.nan
    dq, dk, dv = torch.autograd.grad(fastattn.attention(q, k, v, causal=True, backend=backend), (q, k, v), dout)
    assert dq[0, 0, 3].isnan().all()
    assert dk[0, 0, :4].isnan().all()
    assert dv[0, 0, :4].isnan().all()
    assert all(x[0, 1].isfinite().all() for x in (dq, dk, dv))


# ---------------------------------------------------------------------------------------------- -inf scores: no weight


def test_infinite_bias_is_a_mask(backend: str, device: str) -> None:
    mask = torch.rand(2, 1, 9, 11, device=device) < 0.5
    mask[0, 0, 2] = mask[1, 0, 0] = False
    bias = torch.zeros(mask.shape, device=device).masked_fill(~mask, -torch.inf)
    for options in (
        {},
        {"causal": True},
        {"dropout_p": 0.3, "seed": 1},
        {"alibi_slopes": torch.rand(2, device=device)},
    ):
        q, k, v = (torch.randn(2, 2, n, 8, device=device, requires_grad=True) for n in (9, 11, 11))
        found, want = (
            fastattn.attention(q, k, v, return_lse=True, backend=backend, **given, **options)
            for given in ({"bias": bias}, {"mask": mask})
        )
        torch.testing.assert_close(found, want)
        cotangents = torch.randn_like(found[0]), torch.randn_like(found[1])
        grads = (torch.autograd.grad(pair, (q, k, v), cotangents) for pair in (found, want))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_of_infinite_bias_see_nothing(sinks: bool, backend: str, device: str) -> None:
    call = build(Case("-inf rows", seqlen_q=9, seqlen_k=11, bias="bhqk", sinks=sinks), torch.float32, device)
    call.options["bias"][:, :, 3] = call.options["bias"][1, 0, 5] = -torch.inf
    call.options["bias"][:, :, :, 4] = -torch.inf
    found = results(call, backend)
    assert found[0][:, :, 3].abs().max() == 0
    assert found[0][1, 0, 5].abs().max() == 0
    lse = found[1][:, :, 3]
    torch.testing.assert_close(lse, call.options["sinks"].expand_as(lse) if sinks else torch.full_like(lse, -torch.inf))
    assert all(x.isfinite().all() for x in (found[0], *found[2:]))
    dbias = found[5]
    assert dbias[:, :, 3].abs().max() == 0
    assert dbias[:, :, :, 4].abs().max() == 0
    assert found[2][:, :, 3].abs().max() == 0


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_of_infinite_bias_stop_every_gradient(sinks: bool, backend: str, device: str) -> None:
    """Even one that is NaN, as lse = -inf easily makes upstream."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 9, 8, device=device))
    bias = torch.zeros(9, 9, device=device)
    bias[0] = bias[4] = -torch.inf
    bias.requires_grad_()
    sink = torch.randn(2, device=device) if sinks else None
    out = fastattn.attention(q, k, v, bias=bias, sinks=sink, backend=backend)
    clean = torch.randn_like(out)
    dirty = clean.clone()
    dirty[:, :, [0, 4]] = torch.nan
    want, found = (torch.autograd.grad(out, (q, k, v, bias), x, retain_graph=True) for x in (clean, dirty))
    for a, b in zip(found, want, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


def test_sinks_that_are_nan_leave_the_out_of_empty_rows_alone(backend: str, device: str) -> None:
    q, k = torch.randn(1, 1, 4, 8, device=device), torch.randn(1, 1, 2, 8, device=device)
    sinks = torch.full((1,), torch.nan, device=device)
    out, lse = fastattn.attention(q, k, k, causal=True, sinks=sinks, return_lse=True, backend=backend)
    assert lse.isnan().all()
    assert (out[0, 0, :2] == 0).all()
    assert out[0, 0, 2:].isnan().all()


def test_a_sink_of_minus_infinity_is_none(backend: str, device: str) -> None:
    q, k = torch.randn(1, 1, 4, 8, device=device), torch.randn(1, 1, 2, 8, device=device)
    sinks = torch.full((1,), -torch.inf, device=device, requires_grad=True)
    out, lse = fastattn.attention(q, k, k, causal=True, sinks=sinks, return_lse=True, backend=backend)
    without = fastattn.attention(q, k, k, causal=True, return_lse=True, backend=backend)
    torch.testing.assert_close((out, lse), without)
    assert (lse[0, 0, :2] == -torch.inf).all()
    (lse[0, 0, 2:].sum() + out.sum()).backward()
    assert sinks.grad is not None
    assert (sinks.grad == 0).all()


# ------------------------------------------------------------------------------------------------- unseen: never read


def behind_kv_lengths(call: Call, poison: float) -> None:
    for b, length in enumerate(call.case.kv_lengths or ()):
        call.k[b, :, length:] = call.v[b, :, length:] = poison
        call.options["bias"][b, :, :, length:] = poison


def masked_keys(call: Call, poison: float) -> None:
    """Padding: keys that the mask hides from every query, other ones in each sequence."""
    for b, keys in ((0, slice(8, 11)), (1, slice(0, 2))):
        call.options["mask"][b, ..., keys] = False
        call.k[b, :, keys] = call.v[b, :, keys] = poison


def masked_bias(call: Call, poison: float) -> None:
    call.options["bias"].masked_fill_(~call.options["mask"], poison)


def beyond_the_window(call: Call, poison: float) -> None:
    """With 9 queries at the end of 11 keys and window (1, 0), the first key is too far left for all."""
    call.k[:, :, :1] = call.v[:, :, :1] = poison
    i, j = torch.arange(9)[:, None], torch.arange(11)
    outside = ((j < i + 2 - 1) | (j > i + 2)).to(call.q.device)
    call.options["bias"].masked_fill_(outside, poison)


def above_the_diagonal(call: Call, poison: float) -> None:
    """Top-left: the last two keys are behind every query."""
    call.k[:, :, 9:] = call.v[:, :, 9:] = poison
    call.options["bias"].masked_fill_(torch.ones(9, 11, device=call.q.device).triu(1).bool(), poison)


def blind_queries(call: Call, poison: float) -> None:
    """More queries than keys, causal: the first ones see nothing."""
    call.q[:, :, :4] = poison
    call.options["bias"][:, :, :4] = poison


_SMALL = {"seqlen_q": 9, "seqlen_k": 11}
_BIASED = {**_SMALL, "bias": "bhqk"}
UNSEEN: dict[str, tuple[Case, Callable[[Call, float], None]]] = {
    "kv_lengths": (Case("lengths", kv_lengths=(7, 0), causal=True, heads_q=4, **_BIASED), behind_kv_lengths),
    "kv_lengths, dropout": (Case("dropout", kv_lengths=(7, 2), dropout_p=0.3, **_BIASED), behind_kv_lengths),
    "padding": (Case("padding", mask="b11k", softcap=2.0, sinks=True, **_SMALL), masked_keys),
    "bias under the mask": (Case("mask", mask="bhqk", **_BIASED), masked_bias),
    "window": (Case("window", window=(1, 0), alibi="h", **_BIASED), beyond_the_window),
    "diagonal": (Case("diagonal", causal=True, causal_alignment="top-left", **_BIASED), above_the_diagonal),
    "queries": (Case("queries", seqlen_q=9, seqlen_k=5, causal=True, bias="bhqk", sinks=True), blind_queries),
}


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", UNSEEN)
def test_unseen_memory_does_not_matter(where: str, poison: float, backend: str, device: str) -> None:
    """The same bits in every output and gradient, whatever stands where no query looks."""
    case, spoil = UNSEEN[where]
    clean, dirty = build(case, torch.float32, device), build(case, torch.float32, device)
    spoil(clean, 0.0)
    spoil(dirty, poison)
    for name, a, b in zip(("out", "lse", *clean.leaves), results(dirty, backend), results(clean, backend), strict=True):
        assert not a.isnan().any(), name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("page_size", [0, 4])
def test_unused_cache_does_not_matter(page_size: int, backend: str, device: str) -> None:
    """Columns of the bias past the keys, like the rest of the cache (which is NaN in the cases of test_kv_cache)."""
    capacity = 12
    q, bias = torch.randn(2, 2, 3, 8, device=device), torch.randn(2, 2, 3, capacity, device=device)
    blocks, slots = (2, capacity) if page_size == 0 else (2 * capacity // page_size, page_size)
    cache = torch.randn(blocks, 2, slots, 8, device=device)
    table = torch.arange(blocks, dtype=torch.int32, device=device).view(2, -1) if page_size else None
    lengths = torch.tensor([5, 0], dtype=torch.int32, device=device)
    outs = []
    for poison in (0.0, torch.nan, torch.inf):
        spoiled = bias.clone()
        spoiled[0, :, :, 5:] = spoiled[1] = poison
        outs.append(
            fastattn.attention_with_kv_cache(
                *(q, cache, cache), cache_lengths=lengths, block_table=table, bias=spoiled, causal=True, backend=backend
            )
        )
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


# ---------------------------------------------------------------------------------------------- large but finite scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True, "sinks": True}], ids=str)
def test_large_scores_do_not_overflow(options: dict, dtype: torch.dtype, backend: str, device: str) -> None:
    """Scores far past the largest float16 are still exact in float32."""
    call = build(Case("large", seqlen_q=9, seqlen_k=11, head_dim=64, scale=1.0, **options), dtype, device)
    call.q *= 60
    call.k *= 60
    out, lse = call.run(return_lse=True, backend=backend)
    exact = evaluate(oracle, as_arrays(call))
    assert np.abs(exact.lse).max() > 65504
    assert_close("out", out, exact.out, None, dtype)
    assert_close("lse", lse, exact.lse, None, torch.float32)
    assert all(x.isfinite().all() for x in results(call, backend))


@pytest.mark.parametrize("shift", [-1e30, -1e5, 1e5])
def test_a_shift_of_all_scores_changes_lse_alone(shift: float, backend: str, device: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8, device=device).unbind()
    out, lse = fastattn.attention(torch.zeros_like(q), k, v, return_lse=True, backend=backend)
    bias = torch.full((1,), shift, device=device)
    shifted, moved = fastattn.attention(torch.zeros_like(q), k, v, bias=bias, return_lse=True, backend=backend)
    torch.testing.assert_close(shifted, out)
    torch.testing.assert_close(moved, lse + shift)


def test_sinks_from_nothing_to_everything(backend: str, device: str) -> None:
    q, k, v = torch.randn(3, 1, 3, 9, 8, device=device).unbind()
    sinks = torch.tensor([-torch.inf, -1e30, 1e5], device=device)
    out, lse = fastattn.attention(q, k, v, sinks=sinks, return_lse=True, backend=backend)
    plain, plain_lse = fastattn.attention(q, k, v, return_lse=True, backend=backend)
    torch.testing.assert_close(out[:, :2], plain[:, :2])
    torch.testing.assert_close(lse[:, :2], plain_lse[:, :2])
    assert out[:, 2].abs().max() == 0
    assert (lse[:, 2] == 1e5).all()


def test_masked_scores_do_not_set_the_maximum(backend: str, device: str) -> None:
    """A huge score under the mask must not push all others out of the exponent's range."""
    q, v = torch.ones(1, 1, 1, 4, device=device), torch.randn(1, 1, 3, 4, device=device)
    k = torch.zeros(1, 1, 3, 4, device=device)
    k[0, 0, 1] = 1e6
    mask = torch.tensor([True, False, True], device=device)
    out = fastattn.attention(q, k, v, mask=mask, backend=backend)
    torch.testing.assert_close(out[0, 0, 0], (v[0, 0, 0] + v[0, 0, 2]) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_next_to_the_last_key_of_some_rows(dtype: torch.dtype, backend: str, device: str) -> None:
    """Panels of rows end at odd keys here; the key behind, masked out, shares a word of two bfloat16 with the last."""
    q = torch.randn(1, 16, 64, 64, device=device).to(dtype)
    k, v = torch.randn(2, 1, 16, 65, 64, device=device).to(dtype).unbind()
    mask = torch.ones(65, dtype=torch.bool, device=device)
    mask[33] = False
    expected = fastattn.attention(q, k, v, causal=True, mask=mask, backend=backend)
    k, v = k.clone(), v.clone()
    k[:, :, 33] = v[:, :, 33] = torch.nan
    out = fastattn.attention(q, k, v, causal=True, mask=mask, backend=backend)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("left", range(12))
@pytest.mark.needs_dtype(torch.bfloat16)
def test_rows_that_stand_far_behind_the_last_key(left: int, backend: str, device: str) -> None:
    """Their windows begin past the keys that exist, at odd places among others."""
    q = torch.randn(1, 1, 300, 32, device=device).bfloat16()
    k, v = torch.randn(2, 1, 1, 64, 32, device=device).bfloat16().unbind()
    out, lse = fastattn.attention(
        q, k, v, causal_alignment="top-left", window=(left, 0), return_lse=True, backend=backend
    )
    assert out[:, :, 64 + left :].eq(0).all()
    assert lse[:, :, 64 + left :].eq(-torch.inf).all()
    assert out[:, :, : 64 + left].isfinite().all()
