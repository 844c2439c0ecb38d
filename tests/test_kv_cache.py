"""Attention over a cache that it first extends: contiguous and paged, with rotary embedding, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import fastattn

from . import cases
from .cache_cases import CONTIGUOUS, PAGED, ROTARY, CacheCase, build, expected, lse_dtype, tables
from .tolerance import assert_close, to_numpy

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def same_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b) | (np.isnan(a) & np.isnan(b))


def check(case: CacheCase, dtype: torch.dtype, backend: str, device: str) -> None:
    call, want = build(case, dtype, device), expected(case, dtype)
    before = [to_numpy(x).copy() for x in (call.k_cache, call.v_cache)]
    lengths = call.options["cache_lengths"].clone()
    out, lse = call.run(return_lse=True, backend=backend)
    assert out.dtype == dtype
    assert_close("out", out, want.exact.out, want.eager_out, dtype)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close("lse", lse, want.exact.lse, want.eager_lse, lse_dtype(case, dtype))
    assert torch.equal(call.options["cache_lengths"], lengths)
    check_cache("k_cache", call.k_cache, before[0], want.k_cache, dtype, rounded=bool(case.rotary_dim))
    check_cache("v_cache", call.v_cache, before[1], want.v_cache, dtype, rounded=False)


def check_cache(
    name: str, cache: Tensor, before: np.ndarray, exact: np.ndarray, dtype: torch.dtype, *, rounded: bool
) -> None:
    """The new rows are as they should be, and no other element has changed, NaN included."""
    found = to_numpy(cache)
    written = ~same_bits(exact, before)
    assert same_bits(found, before)[~written].all(), f"{name}: written where it should not be"
    if rounded:
        assert_close(name, cache[torch.from_numpy(written).to(cache.device)], exact[written], None, dtype)
    else:
        assert (found == exact)[written].all(), f"{name}: the new rows are not what was given"


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CONTIGUOUS, *ROTARY], ids=str)
def test_contiguous(case: CacheCase, dtype: torch.dtype, backend: str, device: str) -> None:
    check(case, dtype, backend, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PAGED, ids=str)
def test_paged(case: CacheCase, dtype: torch.dtype, backend: str, device: str) -> None:
    check(case, dtype, backend, device)


@pytest.mark.parametrize("case", [CONTIGUOUS[-1], PAGED[-1]], ids=str)
def test_lse_is_optional(case: CacheCase, backend: str, device: str) -> None:
    first, second = build(case, device=device), build(case, device=device)
    assert torch.equal(first.run(backend=backend), second.run(return_lse=True, backend=backend)[0])


def test_paged_equals_contiguous(backend: str, device: str) -> None:
    """The cache of a case, copied into pages, gives the same output: it is a matter of addresses alone."""
    call = build(CONTIGUOUS[-1], device=device)
    k_cache, v_cache = call.k_cache.clone(), call.v_cache.clone()
    out = call.run(backend=backend)
    batch, heads, capacity, _ = k_cache.shape
    pages = [x.unflatten(2, (capacity // 8, 8)).transpose(1, 2).flatten(0, 1).contiguous() for x in (k_cache, v_cache)]
    table = torch.arange(batch * capacity // 8, dtype=torch.int32, device=device).view(batch, -1)
    paged = fastattn.attention_with_kv_cache(call.q, *pages, block_table=table, backend=backend, **call.options)
    torch.testing.assert_close(paged, out)
    assert pages[0].shape[1] == heads


def test_pages_may_be_shared(backend: str, device: str) -> None:
    """Two sequences with a common prefix hold it once and go their own ways behind it."""
    pages = torch.randn(4, 2, 4, 8, device=device)
    q, new = torch.randn(2, 2, 1, 8, device=device), torch.randn(2, 2, 1, 8, device=device)
    table = torch.tensor([[2, 0, -1], [2, 3, -1]], dtype=torch.int32, device=device)
    lengths = torch.tensor([5, 4], dtype=torch.int32, device=device)
    k_pages, v_pages = pages.clone(), pages.flip(0).contiguous()
    out = fastattn.attention_with_kv_cache(
        *(q, k_pages, v_pages),
        cache_lengths=lengths,
        k_new=new,
        v_new=new,
        block_table=table,
        causal=True,
        backend=backend,
    )
    own = [[x[2], x[0]] for x in (k_pages, v_pages)], [[x[2], x[3]] for x in (k_pages, v_pages)]
    for b, total in ((0, 6), (1, 5)):
        k, v = (torch.cat(parts, dim=1)[None, :, :total] for parts in own[b])
        torch.testing.assert_close(out[b : b + 1], fastattn.attention(q[b : b + 1], k, v, backend=backend))
    assert torch.equal(k_pages[2], pages[2])
    assert torch.equal(k_pages[1], pages[1])
    assert torch.equal(k_pages[0][:, 1], new[0, :, 0])
    assert torch.equal(k_pages[3][:, 0], new[1, :, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("page_size", [0, 4])
def test_decoding_equals_attention_over_the_whole(
    page_size: int, interleaved: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    """A prompt, a chunk, then token by token: the outputs are those of one causal call over all tokens."""
    batch, heads, tokens, dim = 2, 2, 20, 8
    q, k, v = torch.randn(3, batch, heads, tokens, dim, device=device, dtype=dtype).unbind()
    rotary = tables(dim, tokens, interleaved, dtype, device)
    options = {
        "causal": True,
        "window": (9, None),
        "alibi_slopes": torch.rand(heads, device=device),
        "backend": backend,
    }
    positions = torch.arange(tokens, device=device)
    turned = (fastattn.apply_rotary(x, rotary, positions) for x in (q, k))
    whole = fastattn.attention(*turned, v, **options)

    blocks, slots = (batch, tokens) if page_size == 0 else (batch * tokens // page_size, page_size)
    caches = [torch.full((blocks, heads, slots, dim), torch.nan, device=device, dtype=dtype) for _ in range(2)]
    table = torch.arange(blocks, dtype=torch.int32, device=device).flip(0).view(batch, -1) if page_size else None
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    outs = []
    for start, stop in ((0, 6), (6, 11), *((t, t + 1) for t in range(11, tokens))):
        part = slice(start, stop)
        new = {"k_new": k[:, :, part], "v_new": v[:, :, part], "cache_lengths": lengths, "block_table": table}
        outs.append(fastattn.attention_with_kv_cache(q[:, :, part], *caches, **new, rotary=rotary, **options))
        lengths += stop - start
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(torch.cat(outs, dim=2), whole, rtol=tolerance, atol=tolerance)


def test_sequences_of_different_lengths_advance_together(backend: str, device: str) -> None:
    """Each sequence's result is that of its own call."""
    case = CacheCase("ragged", lengths=(3, 17, 9), seqlen_q=2, seqlen_new=2, alibi=True, rotary_dim=16)
    together, alone = build(case, device=device), build(case, device=device)
    out = together.run(backend=backend)
    for b in range(3):
        own = {n: x[b : b + 1] if n in ("cache_lengths", "k_new", "v_new") else x for n, x in alone.options.items()}
        caches = (alone.k_cache[b : b + 1], alone.v_cache[b : b + 1])
        one = fastattn.attention_with_kv_cache(alone.q[b : b + 1], *caches, backend=backend, **own)
        torch.testing.assert_close(one, out[b : b + 1])


def test_writes_through_views(backend: str, device: str) -> None:
    """k and v caches that are parts of one tensor are extended where they lie."""
    both = torch.zeros(2, 2, 1, 6, 4, device=device)
    k_cache, v_cache = both.unbind(1)
    new = torch.randn(2, 2, 1, 1, 4, device=device).unbind()
    lengths = torch.tensor([2, 0], dtype=torch.int32, device=device)
    fastattn.attention_with_kv_cache(
        torch.randn(2, 1, 1, 4, device=device),
        k_cache,
        v_cache,
        cache_lengths=lengths,
        k_new=new[0],
        v_new=new[1],
        backend=backend,
    )
    assert torch.equal(both[0, :, :, 2], torch.stack((new[0][0, :, 0], new[1][0, :, 0])))
    assert torch.equal(both[1, :, :, 0], torch.stack((new[0][1, :, 0], new[1][1, :, 0])))
    assert torch.count_nonzero(both) == 16


def test_layout_of_out(backend: str, device: str) -> None:
    q = torch.randn(2, 3, 4, 8, device=device).transpose(1, 2)
    cache = torch.randn(2, 2, 9, 8, device=device)
    lengths = torch.tensor([9, 4], dtype=torch.int32, device=device)
    out = fastattn.attention_with_kv_cache(q, cache, cache[..., :6], cache_lengths=lengths, backend=backend)
    assert out.shape == (2, 4, 3, 6)
    assert out.transpose(1, 2).is_contiguous()


def test_version_counters_see_the_write(backend: str, device: str) -> None:
    """Autograd must notice that a saved cache was overwritten."""
    call = build(CONTIGUOUS[1], device=device)
    before = call.k_cache._version, call.v_cache._version
    call.run(backend=backend)
    assert call.k_cache._version > before[0]
    assert call.v_cache._version > before[1]
