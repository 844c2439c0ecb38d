"""Calls with a key/value cache, as data, and the tensors they stand for."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn

from . import eager, oracle
from .cases import scattered
from .tolerance import to_numpy


@dataclass(frozen=True)
class CacheCase:
    """One call. Sequence b has lengths[b] keys in its cache and gets seqlen_new more."""

    name: str
    lengths: tuple[int, ...] = (11, 0, 29)
    seqlen_q: int = 1
    seqlen_new: int = 0
    capacity: int = 40  # must be a multiple of the page size
    page_size: int = 0  # 0 = contiguous
    heads_q: int = 4
    heads_kv: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    rotary_dim: int = 0
    interleaved: bool = False
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    causal_alignment: str = "bottom-right"
    q_offset: tuple[int, ...] | None = None
    mask: bool = False
    bias: bool = False
    alibi: bool = False
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    layout: str = "heads first"

    def __str__(self) -> str:
        return self.name

    @property
    def totals(self) -> list[int]:
        """Keys after the call."""
        return [length + self.seqlen_new for length in self.lengths]


@dataclass
class CacheCall:
    """The tensors and keyword arguments of a case; k and v are the caches as if they were contiguous."""

    case: CacheCase
    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    options: dict[str, Any]

    def run(self, **more: Any) -> Any:
        """Calls fastattn."""
        return fastattn.attention_with_kv_cache(self.q, self.k_cache, self.v_cache, **self.options, **more)


def build(case: CacheCase, dtype: torch.dtype = torch.float32, device: str = "cpu") -> CacheCall:
    """The tensors of a case. All that must not be read is NaN, and block_table names no page where none is needed."""
    random = torch.Generator().manual_seed(sum(map(ord, case.name)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype)

    batch = len(case.lengths)
    q = normal(batch, case.heads_q, case.seqlen_q, case.head_dim)
    k = normal(batch, case.heads_kv, case.capacity, case.head_dim)
    v = normal(batch, case.heads_kv, case.capacity, case.head_dim_v)
    for b, length in enumerate(case.lengths):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    names = ("causal", "window", "causal_alignment", "softcap", "scale")
    options: dict[str, Any] = {"cache_lengths": lengths, **{name: getattr(case, name) for name in names}}
    if case.seqlen_new:
        options["k_new"] = normal(batch, case.heads_kv, case.seqlen_new, case.head_dim)
        options["v_new"] = normal(batch, case.heads_kv, case.seqlen_new, case.head_dim_v)
    if case.q_offset is not None:
        options["q_offset"] = torch.tensor(case.q_offset, dtype=torch.int32, device=device)
    if case.rotary_dim:
        positions = max([*case.totals, case.seqlen_q, 1, *(first + case.seqlen_q for first in case.q_offset or ())])
        options["rotary"] = tables(case.rotary_dim, positions, case.interleaved, dtype, device)
    if case.mask:
        shape = (batch, 1, case.seqlen_q, case.capacity)
        options["mask"] = (torch.rand(shape, generator=random) < 0.7).to(device)
    if case.bias:
        options["bias"] = normal(1, case.heads_q, case.seqlen_q, case.capacity)
    if case.alibi:
        options["alibi_slopes"] = 0.3 * torch.rand(case.heads_q, generator=random).to(device)
    if case.sinks:
        options["sinks"] = normal(case.heads_q)
    k_cache, v_cache = k, v
    if case.page_size:
        k_cache, v_cache, options["block_table"] = paged(case, k, v, random)
    arrange = LAYOUTS[case.layout]
    return CacheCall(case, q, k, v, arrange(k_cache), arrange(v_cache), options)


def tables(rotary_dim: int, positions: int, interleaved: bool, dtype: torch.dtype, device: str) -> fastattn.Rotary:
    """The usual rotary tables, in float32 (float64 for float64)."""
    speed = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * speed
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return fastattn.Rotary(angle.cos().to(device, wide), angle.sin().to(device, wide), interleaved)


def paged(case: CacheCase, k: Tensor, v: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """k and v cut into pages in random order, and the block table. Pages that nobody owns are NaN."""
    size, batch = case.page_size, len(case.lengths)
    needed = [math.ceil(total / size) for total in case.totals]
    order = torch.randperm(sum(needed) + 3, generator=random).tolist()
    k_pages, v_pages = (x.new_full((len(order), x.shape[1], size, x.shape[3]), torch.nan) for x in (k, v))
    table = torch.full((batch, case.capacity // size), -(2**31), dtype=torch.int32)
    for b in range(batch):
        for slot in range(needed[b]):
            page = order.pop()
            table[b, slot] = page
            rows = slice(slot * size, (slot + 1) * size)
            k_pages[page], v_pages[page] = k[b, :, rows], v[b, :, rows]
    return k_pages, v_pages, table.to(k.device)


LAYOUTS = {
    "heads first": lambda x: x,
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # (batch, capacity, heads, head_dim)
    "scattered": scattered,
}


@dataclass(frozen=True)
class Expected:
    """What a case must give, and what eager PyTorch gives in the same dtype."""

    exact: oracle.Result
    k_cache: Any
    v_cache: Any
    eager_out: Tensor
    eager_lse: Tensor


@functools.cache
def expected(case: CacheCase, dtype: torch.dtype) -> Expected:
    """Evaluated once, for all backends and tests."""
    call = build(case, dtype)
    arrays = {name: to_array(x) for name, x in call.options.items()}
    exact, k_cache, v_cache = oracle.cached(to_numpy(call.q), to_numpy(call.k_cache), to_numpy(call.v_cache), **arrays)
    out = eager_cached(call, dtype)[0]
    lse = eager_cached(call, lse_dtype(case, dtype))[1]
    return Expected(exact, k_cache, v_cache, out, lse)


def lse_dtype(case: CacheCase, dtype: torch.dtype) -> torch.dtype:
    """The precision to be asked of lse: rotated keys are rounded to the dtype of the cache that holds them."""
    return dtype if dtype == torch.float64 or case.rotary_dim else torch.float32


def to_array(x: Any) -> Any:
    """Tensors, also within a Rotary, as arrays."""
    if isinstance(x, tuple) and any(isinstance(part, Tensor) for part in x):
        return tuple(to_array(part) for part in x)
    if not isinstance(x, Tensor):
        return x
    return to_numpy(x) if x.is_floating_point() else x.cpu().numpy()


def eager_cached(call: CacheCall, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse): the dense computation in `dtype` over the contiguous caches."""
    case, options = call.case, dict(call.options)
    q, k, v = (x.to(dtype).nan_to_num(0.0) for x in (call.q, call.k, call.v))
    lengths, rotary = options.pop("cache_lengths"), options.pop("rotary", None)
    k_new, v_new = options.pop("k_new", None), options.pop("v_new", None)
    options.pop("block_table", None)
    total = lengths + case.seqlen_new
    if rotary is not None:
        offset = total - case.seqlen_q if case.causal_alignment == "bottom-right" else torch.zeros_like(total)
        offset = options.get("q_offset", offset)
        q = eager.rotate(q, *rotary, (offset[:, None] + torch.arange(case.seqlen_q)).clamp(min=0))
        if k_new is not None:
            k_new = eager.rotate(k_new.to(dtype), *rotary, lengths[:, None] + torch.arange(case.seqlen_new))
    if k_new is not None:
        for b, (start, end) in enumerate(zip(case.lengths, case.totals, strict=True)):
            k[b, :, start:end], v[b, :, start:end] = k_new[b], v_new[b]
    return eager.dense(q, k, v, kv_lengths=total, **options)


# ------------------------------------------------------------------------------------------------------------- lists

_PREFILL = {"lengths": (0, 0, 0), "seqlen_q": 21, "seqlen_new": 21}
_CHUNK = {"lengths": (11, 0, 26), "seqlen_q": 5, "seqlen_new": 5}
_STEP = {"seqlen_new": 1}
_FLAGS = {"mask": True, "bias": True, "alibi": True, "softcap": 0.9, "sinks": True, "scale": 0.4}

CONTIGUOUS = (
    CacheCase("decode without new keys"),
    CacheCase("decode", **_STEP),
    CacheCase("decode, not causal", causal=False, **_STEP),
    CacheCase("chunk", **_CHUNK),
    CacheCase("chunk, not causal", causal=False, **_CHUNK),
    CacheCase("prefill", **_PREFILL),
    CacheCase("full cache", lengths=(40, 39, 40)),
    CacheCase("filled to the brim", lengths=(35, 0, 35), seqlen_q=5, seqlen_new=5),
    CacheCase("nothing cached", lengths=(0, 0), seqlen_q=3, sinks=True),
    CacheCase("more queries than new keys", seqlen_q=4, seqlen_new=2),
    CacheCase("fewer queries than new keys", seqlen_q=1, seqlen_new=6),
    CacheCase("more queries than keys", lengths=(2, 0), seqlen_q=6, seqlen_new=1),
    CacheCase("top-left", causal_alignment="top-left", seqlen_q=4, **_STEP),
    CacheCase("q_offset", q_offset=(9, 0, 28), **_CHUNK),
    CacheCase("q_offset before the keys", q_offset=(-9, -3, 8), **_CHUNK),
    CacheCase("q_offset past the keys", q_offset=(16, 9, 1000), window=(4, None), sinks=True, **_CHUNK),
    CacheCase("q_offset, everything", q_offset=(9, 0, 28), rotary_dim=8, window=(6, 3), **_CHUNK, **_FLAGS),
    CacheCase("window", window=(7, 0), **_CHUNK),
    CacheCase("window both sides", window=(6, 2), causal=False, **_CHUNK),
    CacheCase("mask", mask=True, **_CHUNK),
    CacheCase("bias", bias=True, **_CHUNK),
    CacheCase("alibi", alibi=True, **_CHUNK),
    CacheCase("softcap", softcap=0.6, **_CHUNK),
    CacheCase("sinks", sinks=True, **_CHUNK),
    CacheCase("scale", scale=0.9, **_CHUNK),
    CacheCase("MHA", heads_q=2, **_STEP),
    CacheCase("MQA", heads_q=6, heads_kv=1, **_STEP),
    CacheCase("head_dim_v", head_dim=24, head_dim_v=7, **_CHUNK),
    CacheCase("one sequence", lengths=(17,), **_STEP),
    CacheCase("no sequence", lengths=(), **_STEP),
    CacheCase("no query", seqlen_q=0, **_STEP),
    CacheCase("no capacity", lengths=(0, 0), capacity=0),
    CacheCase("long", lengths=(257, 64, 128), capacity=300, seqlen_q=1, seqlen_new=1, head_dim=64, head_dim_v=64),
    CacheCase("tokens first", layout="tokens first", **_CHUNK),
    CacheCase("scattered", layout="scattered", **_CHUNK),
    CacheCase("everything", window=(13, 3), rotary_dim=8, **_FLAGS, **_CHUNK),
)

PAGED = (
    *(CacheCase(f"page size {n}", page_size=n, **_CHUNK) for n in (1, 2, 5, 8, 20, 40)),
    CacheCase("page size 3", page_size=3, capacity=39, **_CHUNK),
    CacheCase("page size 16", lengths=(31, 0, 50), capacity=64, page_size=16, **_STEP),
    CacheCase("page size 256", lengths=(256, 3, 300), capacity=512, page_size=256, **_STEP),
    CacheCase("paged decode without new keys", page_size=8),
    CacheCase("paged decode", page_size=8, **_STEP),
    CacheCase("paged prefill", page_size=8, **_PREFILL),
    CacheCase("new keys begin a page", lengths=(8, 16, 0), page_size=8, **_STEP),
    CacheCase("new keys end a page", lengths=(7, 15, 39), page_size=8, **_STEP),
    CacheCase("new keys cross pages", lengths=(6, 13, 0), page_size=4, seqlen_q=9, seqlen_new=9),
    CacheCase("paged, nothing cached", lengths=(0, 0), page_size=8),
    CacheCase("paged, no sequence", lengths=(), page_size=8),
    CacheCase("paged, tokens first", page_size=8, layout="tokens first", **_CHUNK),
    CacheCase("paged, scattered", page_size=8, layout="scattered", **_CHUNK),
    CacheCase("paged everything", page_size=8, window=(13, 3), rotary_dim=12, interleaved=True, **_FLAGS, **_CHUNK),
)

ROTARY = tuple(
    CacheCase(f"rotary {dim}{name}{where}", rotary_dim=dim, interleaved=flag, page_size=pages, **sizes)
    for dim, name, flag, where, pages, sizes in (
        (16, "", False, "", 0, _CHUNK),
        (16, " interleaved", True, "", 0, _CHUNK),
        (10, " of 16", False, "", 0, _CHUNK),
        (10, " of 16 interleaved", True, "", 0, _CHUNK),
        (2, " of 16", False, "", 0, _STEP),
        (16, "", False, ", paged", 8, _CHUNK),
        (10, " interleaved", True, ", paged", 8, _STEP),
        (16, "", False, ", prefill", 0, _PREFILL),
        (16, "", False, ", no new keys", 0, {}),
        (16, "", False, ", top-left", 0, {**_CHUNK, "causal_alignment": "top-left"}),
        (16, "", False, ", more queries than keys", 0, {"lengths": (2, 0), "seqlen_q": 6, "seqlen_new": 1}),
    )
)
