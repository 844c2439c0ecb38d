"""KVCache: what it returns, and what it does with its pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.nn import KVCache, MultiheadAttention, RotaryEmbedding

BATCH, HEADS_Q, HEADS_KV, D, DV = 3, 4, 2, 8, 6

LAYOUTS = [{}, {"page_size": 1}, {"page_size": 4}, {"page_size": 64}]


def make_cache(capacity: int = 20, **options: Any) -> KVCache:
    """A cache whose memory is NaN wherever nothing was written."""
    cache = KVCache(BATCH, HEADS_KV, capacity, D, head_dim_v=DV, **options)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return cache


def tokens(seqlen: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of new tokens."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS_Q, seqlen, D), (HEADS_KV, seqlen, D), (HEADS_KV, seqlen, DV))
    q, k, v = (torch.randn(BATCH, *shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


class Expected:
    """The same, by concatenating each sequence's keys and values."""

    def __init__(self) -> None:
        self.keys = [torch.empty(HEADS_KV, 0, D) for _ in range(BATCH)]
        self.values = [torch.empty(HEADS_KV, 0, DV) for _ in range(BATCH)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        outs = []
        for b in range(BATCH):
            self.keys[b] = torch.cat((self.keys[b], k[b].float()), dim=1)
            self.values[b] = torch.cat((self.values[b], v[b].float()), dim=1)
            outs.append(fastattn.attention(q[b : b + 1].float(), self.keys[b][None], self.values[b][None], **options))
        return torch.cat(outs)

    def keep(self, lengths: list[int]) -> None:
        for b, n in enumerate(lengths):
            self.keys[b], self.values[b] = self.keys[b][:, :n], self.values[b][:, :n]

    def reorder(self, indices: list[int]) -> None:
        self.keys = [self.keys[i] for i in indices]
        self.values = [self.values[i] for i in indices]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_session_of_everything(layout: dict[str, Any], dtype: torch.dtype) -> None:
    """Prefill, single tokens, several at once, forgetting, new sequences, beams."""
    cache, expected = make_cache(dtype=dtype, **layout), Expected()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}

    def step(seqlen: int, seed: int) -> None:
        q, k, v = tokens(seqlen, seed, dtype)
        out = cache.attend(q, k, v, causal=True, window=(9, None))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected.attend(q, k, v, causal=True, window=(9, None)), **tolerance)

    step(5, 0)
    cache.truncate([5, 3, 1])
    expected.keep([5, 3, 1])
    step(1, 1)
    step(4, 2)
    assert cache.lengths.tolist() == [10, 8, 6]
    cache.reorder([2, 0, 2])
    expected.reorder([2, 0, 2])
    assert cache.lengths.tolist() == [6, 10, 6]
    step(1, 3)
    step(1, 4)
    cache.reorder(torch.tensor([1, 1, 1]))
    expected.reorder([1, 1, 1])
    step(3, 5)
    cache.reset([0])
    expected.keep([0, 15, 15])
    step(2, 6)
    assert cache.lengths.dtype == torch.int32
    assert cache.lengths.tolist() == [2, 17, 17]
    cache.reset()
    expected.keep([0, 0, 0])
    assert cache.is_empty
    step(20, 7)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_looking_without_appending(layout: dict[str, Any]) -> None:
    cache, expected = make_cache(**layout), Expected()
    q, k, v = tokens(5, 0)
    cache.attend(q, k, v)
    out, lse = cache.attend(q[:, :, :2], return_lse=True)
    want = expected.attend(q, k, v)[:, :, :2]
    torch.testing.assert_close(out, want)
    assert lse.shape == (BATCH, HEADS_Q, 2)
    assert cache.lengths.tolist() == [5, 5, 5]


def test_queries_of_another_dtype_are_cast_and_cast_back() -> None:
    cache = make_cache(dtype=torch.bfloat16)
    q, k, v = tokens(3, 0)
    out = cache.attend(q, k, v)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, Expected().attend(q, k, v), rtol=3e-2, atol=3e-2)


def test_pages_are_taken_shared_and_freed() -> None:
    cache = make_cache(capacity=16, page_size=4, num_pages=9)
    assert cache.free_pages == 9
    q, k, v = tokens(5, 0)
    cache.attend(q, k, v)
    assert cache.free_pages == 3  # two pages each
    cache.reorder([0, 0, 0])
    assert cache.free_pages == 7  # all share the first one's
    one = tokens(1, 1)
    cache.attend(*one)
    assert cache.free_pages == 5  # the full page stays shared, the other two sequences copy the half one
    table = cache.block_table
    assert table[0, 0] == table[1, 0] == table[2, 0]
    assert table[:, 1].unique().numel() == 3
    cache.truncate(4)
    assert cache.free_pages == 8
    cache.reset([0, 1])
    assert cache.free_pages == 8  # the third still uses the page
    cache.reset()
    assert cache.free_pages == 9


def test_too_few_pages_is_said_before_anything_is_written() -> None:
    cache = make_cache(capacity=16, page_size=4, num_pages=5)
    q, k, v = tokens(4, 0)
    cache.attend(q, k, v)
    before = cache.keys.clone()
    with pytest.raises(ValueError, match="needs 3 more pages of 4 keys, and 2 of its 5 are free"):
        cache.attend(*tokens(1, 1))
    assert torch.equal(cache.keys.nan_to_num(7.0), before.nan_to_num(7.0))
    assert cache.lengths.tolist() == [4, 4, 4]
    cache.reset([1])
    cache.truncate([4, 0, 3])
    cache.attend(*tokens(1, 2))
    assert cache.free_pages == 1


def test_the_last_page_serves_the_last_writer() -> None:
    """Two sequences share a half page and one page is free: one copies, the other one keeps."""
    cache = KVCache(2, 1, 4, D, page_size=4, num_pages=2)
    k = torch.randn(2, 1, 2, D)
    cache.attend(torch.randn(2, 1, 1, D), k, k)
    cache.reorder([1, 1])
    assert cache.free_pages == 1
    cache.attend(torch.randn(2, 1, 1, D), k[:, :, :1], k[:, :, :1])
    assert cache.free_pages == 0
    assert sorted(cache.block_table[:, 0].tolist()) == [0, 1]


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
def test_overflow_is_said_before_anything_is_written(layout: dict[str, Any]) -> None:
    cache = make_cache(capacity=8, **layout)
    cache.attend(*tokens(7, 0))
    cache.truncate([3, 7, 0])
    with pytest.raises(ValueError, match="at most 8 keys per sequence: sequence 1 has 7, and 2 more were given"):
        cache.attend(*tokens(2, 1))
    assert cache.lengths.tolist() == [3, 7, 0]


def test_capacity_is_whole_pages() -> None:
    cache = KVCache(2, 1, 10, 4, page_size=4)
    assert (cache.capacity, cache.block_table.shape) == (12, (2, 3))


BAD = [
    (lambda: KVCache(0, 1, 8, 4), "batch must be at least 1"),
    (lambda: KVCache(1, 1, 0, 4), "capacity must be at least 1"),
    (lambda: KVCache(1, 1, 8, 4, page_size=0), "page_size must be at least 1"),
    (lambda: KVCache(1, 1, 8, 4, num_pages=3), "num_pages needs a page_size"),
    (lambda: KVCache(1, 1, 8, 4, page_size=2, num_pages=-1), "num_pages must be at least 1"),
    (lambda: make_cache().truncate([0, 0]), "lengths must hold one number per sequence, 3, got 2"),
    (lambda: make_cache().truncate(1), r"lengths\[0\] must be from 0 to the present length 0, got 1"),
    (lambda: make_cache().truncate([0, -1, 0]), r"lengths\[1\] must be from 0"),
    (lambda: make_cache().reset([3]), "sequences must hold numbers from 0 to 2, got 3"),
    (lambda: make_cache().reorder([0, 1]), "indices must hold one number per sequence, 3, got 2"),
    (lambda: make_cache().reorder([0, 1, -1]), "indices must hold numbers from 0 to 2, got -1"),
    (lambda: make_cache().attend(*(x[:2] for x in tokens(1, 0))), r"q must have shape .* got \(2, 4, 1, 8\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="capacity must be an integer, got float"):
        KVCache(1, 1, 8.0, 4)  # type: ignore[arg-type]
    for dtype in (torch.int32, torch.complex64, torch.bool, torch.float8_e5m2, "float32"):
        with pytest.raises(TypeError, match="dtype must be float32, float64, bfloat16 or float16, got"):
            KVCache(1, 1, 8, 4, dtype=dtype)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q no tensor": ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
    "k_new no tensor": ({"k_new": [1.0]}, TypeError, "k_new must be a torch.Tensor, got list"),
    "v_new no tensor": ({"v_new": 3}, TypeError, "v_new must be a torch.Tensor, got int"),
    "integer q": ({"q": torch.ones(BATCH, HEADS_Q, 2, D).int()}, TypeError, "q must have dtype float32.*int32"),
    "complex k_new": (
        {"k_new": torch.ones(BATCH, HEADS_KV, 2, D) * 1j},
        TypeError,
        "k_new must have dtype float32, float64, bfloat16 or float16, got torch.complex64",
    ),
    "bool v_new": ({"v_new": torch.ones(BATCH, HEADS_KV, 2, DV).bool()}, TypeError, "v_new must have dtype .*bool"),
    "rank of q": ({"q": torch.ones(BATCH, HEADS_Q, D)}, ValueError, r"q must have shape \(batch, heads_q"),
    "rank of k_new": ({"k_new": torch.ones(BATCH, 2, D)}, ValueError, r"k_new must have shape \(batch, heads_kv"),
    "width of q": ({"q": torch.ones(BATCH, HEADS_Q, 2, D + 1)}, ValueError, r"q must have shape .* \(3, 4, 2, 8\)"),
    "heads of q": ({"q": torch.ones(BATCH, 3, 2, D)}, ValueError, "must be a multiple of the heads of k and v"),
    "heads of k_new": ({"k_new": torch.ones(BATCH, 4, 2, D)}, ValueError, r"k_new must have .* \(3, 2, 2, 8\)"),
    "width of v_new": ({"v_new": torch.ones(BATCH, 2, 2, D)}, ValueError, r"v_new must have .* \(3, 2, 2, 6\)"),
    "length of v_new": ({"v_new": torch.ones(BATCH, 2, 9, DV)}, ValueError, r"v_new must have .* \(3, 2, 2, 6\)"),
    "no v_new": ({"v_new": None}, ValueError, "k_new and v_new go together, got k_new without v_new"),
    "no k_new": ({"k_new": None}, ValueError, "k_new and v_new go together, got v_new without k_new"),
    "option": ({"softcap": -1.0}, ValueError, "softcap must be positive"),
    "mask": ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, "mask must be broadcastable"),
    "unknown option": ({"colour": 1}, TypeError, "colour"),
    "backend": ({"backend": "abacus"}, ValueError, "backend must be .* got 'abacus'"),
    "gradient": ({"q": torch.ones(BATCH, HEADS_Q, 2, D, requires_grad=True)}, ValueError, "inference only"),
}


@pytest.mark.parametrize("layout", [{}, {"page_size": 4}, {"page_size": 1}], ids=str)
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_call_changes_nothing(name: str, layout: dict[str, Any]) -> None:
    """Neither where new pages would be taken, nor where a shared one would be copied."""
    change, error, message = REFUSED[name]
    cache = make_cache(**layout)
    cache.attend(*tokens(3, 0))
    q, k, v = tokens(2, 1)

    def state() -> list[Any]:
        lengths, table = cache.lengths.tolist(), None if cache.block_table is None else cache.block_table.tolist()
        return [lengths, cache.is_empty, cache.free_pages, table]

    def used() -> Tensor:
        blocks = slice(None) if cache.block_table is None else cache.block_table[:, : -(-3 // cache.page_size)].long()
        return torch.cat((cache.keys[blocks], cache.values[blocks]), dim=-1).nan_to_num(7.0)

    def refuse() -> None:
        before, memory = state(), used()
        with pytest.raises(error, match=message):
            cache.attend(**{"q": q, "k_new": k, "v_new": v, **change})
        assert state() == before
        assert torch.equal(used(), memory)

    refuse()
    cache.reorder([1, 1, 0])
    refuse()
    expected = Expected()
    expected.attend(*tokens(3, 0))
    expected.reorder([1, 1, 0])
    torch.testing.assert_close(cache.attend(q, k, v), expected.attend(q, k, v))


def test_gradients_are_refused() -> None:
    q, k, v = tokens(1, 0)
    with pytest.raises(ValueError, match="inference only"):
        make_cache().attend(q.requires_grad_(), k, v)


# -------------------------------------------------------------------------------------- through the attention

MODULES = [
    {},
    {"num_kv_heads": 2},
    {"window": (3, 0), "alibi": True},
    {"rotary": RotaryEmbedding(6)},
    {"rotary": RotaryEmbedding(6, interleaved=True, rotary_dim=4), "qk_norm": True, "num_kv_heads": 1},
    {"softcap": 1.5, "sinks": True, "scale": 0.8},
]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("features", MODULES, ids=lambda f: ", ".join(f) or "plain")
@pytest.mark.parametrize("page_size", [None, 3])
def test_module_step_by_step_is_module_at_once(
    features: dict[str, Any], page_size: int | None, batch_first: bool
) -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(24, 4, batch_first=batch_first, **features).eval()
    x = torch.randn(3, 10, 24)
    sequence = 1 if batch_first else 0
    x = x if batch_first else x.transpose(0, 1).contiguous()
    with torch.no_grad():
        expected, _ = module(x, x, x, need_weights=False, is_causal=True)
        cache = module.new_cache(3, 10, page_size=page_size)
        outs = [
            module(part, part, part, need_weights=False, is_causal=True, kv_cache=cache)[0]
            for part in x.split([4, 1, 3, 1, 1], dim=sequence)
        ]
    torch.testing.assert_close(torch.cat(outs, dim=sequence), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page_size", [None, 4])
def test_module_looks_into_a_memory_projected_once(page_size: int | None) -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(24, 4, kdim=10, vdim=7, batch_first=True).eval()
    query, keys, values = torch.randn(2, 3, 24), torch.randn(2, 8, 10), torch.randn(2, 8, 7)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[0, 5:] = True
    pattern = torch.rand(3, 8) < 0.3
    with torch.no_grad():
        cache = module.new_cache(2, 8, page_size=page_size)
        for key, value in ((keys, values), (None, None), (None, None)):
            call = {"need_weights": False, "key_padding_mask": padding, "attn_mask": pattern}
            found, _ = module(query, key, value, kv_cache=cache, **call)
            torch.testing.assert_close(found, module(query, keys, values, **call)[0], rtol=1e-5, atol=1e-5)
        unbatched = module.new_cache(1, 8)
        found, weights = module(query[0], keys[0], values[0], need_weights=False, kv_cache=unbatched)
        torch.testing.assert_close(found, module(query[0], keys[0], values[0])[0], rtol=1e-5, atol=1e-5)
        assert weights is None


@pytest.mark.parametrize("page_size", [None, 4])
def test_made_in_inference_mode_it_serves_outside(page_size: int | None) -> None:
    with torch.inference_mode():
        module = MultiheadAttention(HEADS_Q * D, HEADS_Q, num_kv_heads=HEADS_KV)
        caches = [make_cache(page_size=page_size), module.new_cache(BATCH, 20, page_size=page_size)]
        caches[0].attend(*tokens(3, 0))
    outside = make_cache(page_size=page_size)
    outside.attend(*tokens(3, 0))
    with torch.no_grad():
        for cache in (caches[0], outside):
            cache.attend(*tokens(2, 1))
            cache.reorder([1, 1, 0])
            cache.truncate([4, 3, 4])
            cache.reset([0])
        q, k, v = tokens(1, 2)
        assert torch.equal(caches[0].attend(q, k, v), outside.attend(q, k, v))
        caches[1].attend(q, k, k)
