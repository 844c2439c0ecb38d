"""The tensors of a validation case. Whatever a call must not read is NaN."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .cases import Cache, Case

DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
_FAR_PAGE = 10**6  # what a block table may hold where no page is needed


@dataclass(frozen=True)
class Data:
    """A call's arguments, shaped as in `fastattn.attention` and its siblings, and its results' gradients.

    options: every keyword argument but return_lse and backend; for varlen also cu_seqlens_q and cu_seqlens_k.
    dout, dlse: of out's and lse's shape.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    dout: Tensor
    dlse: Tensor

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Data, dict[str, Tensor]]:
        """The same data with fresh leaves for the differentiable tensors, which come by name as well.

        With a dtype, every floating point tensor is converted to it.
        """
        data = self._to(dtype) if dtype else self
        found = {name: data._get(name) for name in DIFFERENTIABLE}
        leaves = {name: x.detach().requires_grad_() for name, x in found.items() if x is not None}
        options = {name: leaves.get(name, x) for name, x in data.options.items()}
        return replace(data, q=leaves["q"], k=leaves["k"], v=leaves["v"], options=options), leaves

    def _get(self, name: str) -> Tensor | None:
        return getattr(self, name) if name in ("q", "k", "v") else self.options.get(name)

    def _to(self, dtype: torch.dtype) -> Data:
        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        options = {name: cast(x) for name, x in self.options.items()}
        if "rotary" in options:
            cos, sin, interleaved = options["rotary"]
            options["rotary"] = (cast(cos), cast(sin), interleaved)
        return Data(cast(self.q), cast(self.k), cast(self.v), options, cast(self.dout), cast(self.dlse))


class _Maker:
    """Random tensors of a case: drawn on the CPU, so that every device and dtype sees the same numbers."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.accumulator = torch.promote_types(dtype, torch.float32)
        self.seed = zlib.crc32(f"{case.section}/{case.name}".encode())
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def wide(self, *shape: int) -> Tensor:
        """In the accumulator's dtype, as slopes, tables and gradients of lse are."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.accumulator)

    def chance(self, p: float, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < p).to(self.device)

    def int32(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def shape(self, letters: str) -> tuple[int, ...]:
        """Sizes for letters, as in Case.mask."""
        case = self.case
        pairs = case.lengths or (case.seqlens,)
        queries, keys = (max(lengths) for lengths in zip(*pairs, strict=True))
        sizes = {"b": len(case.lengths) or case.batch, "h": case.heads[0], "q": queries, "k": keys, "1": 1}
        return tuple(sizes[letter] for letter in letters)


def make_data(case: Case, dtype: torch.dtype, device: torch.device) -> Data:
    """The data of a dense, varlen, merge or cache case."""
    make = _Maker(case, dtype, device)
    options = _options(make)
    if case.cache is not None:
        return _cached(make, case.cache, options)
    return _packed(make, options) if case.lengths else _dense(make, options)


def _options(make: _Maker) -> dict[str, Any]:
    case = make.case
    options = dict(case.options)
    if options.get("dropout_p"):
        options.setdefault("seed", make.seed)
    if case.mask is not None:
        options["mask"] = make.chance(0.7, *make.shape(case.mask))
        if case.hidden_rows:
            options["mask"] &= ~make.chance(0.3, *make.shape(case.mask)[:-1], 1)
    if case.bias is not None:
        options["bias"] = make.normal(*make.shape(case.bias))
        if case.minus_inf:
            options["bias"][make.chance(0.2, *make.shape(case.bias))] = -torch.inf
            options["bias"][..., ::5, :] = -torch.inf
    if case.alibi is not None:
        options["alibi_slopes"] = make.wide(*make.shape(case.alibi))
    if case.sinks:
        options["sinks"] = make.normal(case.heads[0])
    if case.kv_lengths is not None:
        options["kv_lengths"] = make.int32(case.kv_lengths)
    if case.q_offset is not None:
        options["q_offset"] = make.int32(case.q_offset)
    return options


# ------------------------------------------------------------------------------------------------------ dense


def _dense(make: _Maker, options: dict[str, Any]) -> Data:
    case = make.case
    (queries, keys), (dim, dim_v), (heads_q, heads_kv) = case.seqlens, case.head_dims, case.heads
    q = make.normal(case.batch, heads_q, queries, dim)
    k = make.normal(case.batch, heads_kv, keys, dim)
    v = make.normal(case.batch, heads_kv, keys, dim_v)
    for b, length in enumerate(case.kv_lengths or ()):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    dout, dlse = make.normal(case.batch, heads_q, queries, dim_v), make.wide(case.batch, heads_q, queries)
    if case.mean:
        k, v = (x + case.mean * make.normal(1, heads_kv, 1, x.shape[-1]) for x in (k, v))
        dlse.zero_()
    q, k, v = LAYOUTS[case.layout](q, k, v)
    return Data(q, k, v, options, dout, dlse)


def _each(place: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    return lambda *tensors: tuple(place(x) for x in tensors)


def _packed_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Views of one (batch, seqlen, 3, heads, dim)."""
    packed = torch.stack([q, k, v], dim=1).permute(0, 3, 1, 2, 4).contiguous()
    return packed.permute(2, 0, 3, 1, 4).unbind()


def _expanded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """All key/value heads are one in memory."""
    return q, k[:, :1].expand_as(k), v[:1].expand_as(v)


def _inside(x: Tensor) -> Tensor:
    outer = x.new_full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 5), torch.nan)
    outer[:, :, 1:-2, 2:-3] = x
    return outer[:, :, 1:-2, 2:-3]


def _strided(x: Tensor) -> Tensor:
    outer = x.new_full((*x.shape[:2], 2 * x.shape[2], x.shape[3]), torch.nan)
    outer[:, :, ::2] = x
    return outer[:, :, ::2]


LAYOUTS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "contiguous": _each(lambda x: x),
    "bshd": _each(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "packed": _packed_qkv,
    "expanded": _expanded,
    "transposed": _each(lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
    "inside": _each(_inside),
    "strided": _each(_strided),
}


# ----------------------------------------------------------------------------------------------------- varlen


def _packed(make: _Maker, options: dict[str, Any]) -> Data:
    case = make.case
    (dim, dim_v), (heads_q, heads_kv) = case.head_dims, case.heads
    ends_q, ends_k = ([0, *accumulate(side)] for side in zip(*case.lengths, strict=True))
    total_q, total_k = ends_q[-1] + case.spare, ends_k[-1] + case.spare
    q = make.normal(total_q, heads_q, dim)
    k, v = make.normal(total_k, heads_kv, dim), make.normal(total_k, heads_kv, dim_v)
    unread = torch.ones(total_k, dtype=torch.bool, device=make.device)
    for start, length in zip(ends_k, case.kv_lengths or [keys for _, keys in case.lengths], strict=False):
        unread[start : start + length] = False
    k[unread] = v[unread] = torch.nan
    q[ends_q[-1] :] = torch.nan
    options |= {"cu_seqlens_q": make.int32(ends_q), "cu_seqlens_k": make.int32(ends_k)}
    return Data(q, k, v, options, make.normal(total_q, heads_q, dim_v), make.wide(heads_q, total_q))


# ------------------------------------------------------------------------------------------------------ cache


def _cached(make: _Maker, cache: Cache, options: dict[str, Any]) -> Data:
    case = make.case
    queries, (dim, dim_v), (heads_q, heads_kv) = case.seqlens[0], case.head_dims, case.heads
    q = make.normal(case.batch, heads_q, queries, dim)
    k = make.normal(case.batch, heads_kv, cache.capacity, dim)
    v = make.normal(case.batch, heads_kv, cache.capacity, dim_v)
    for b, length in enumerate(cache.lengths):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    options["cache_lengths"] = make.int32(cache.lengths)
    if cache.new:
        options["k_new"] = make.normal(case.batch, heads_kv, cache.new, dim)
        options["v_new"] = make.normal(case.batch, heads_kv, cache.new, dim_v)
    if cache.rotary_dim:
        angles = make.wide(cache.capacity, cache.rotary_dim // 2) * 6.0
        options["rotary"] = (angles.cos(), angles.sin(), cache.interleaved)
    if cache.page_size:
        table = _block_table(make, cache)
        options["block_table"] = make.int32(table)
        k, v = _pages(k, table, cache.page_size), _pages(v, table, cache.page_size)
    return Data(q, k, v, options, *(make.normal(0) for _ in range(2)))


def _block_table(make: _Maker, cache: Cache) -> list[list[int]]:
    """A random page for each that a sequence needs; entries behind them point far outside the cache."""
    slots = cache.capacity // cache.page_size
    pages = iter(torch.randperm(len(cache.lengths) * slots, generator=make.generator).tolist())
    needed = [-(-(length + cache.new) // cache.page_size) for length in cache.lengths]
    return [[next(pages) if slot < need else _FAR_PAGE for slot in range(slots)] for need in needed]


def _pages(contiguous: Tensor, table: list[list[int]], page_size: int) -> Tensor:
    """The cache cut into pages, laid out as the table says; unused pages are NaN."""
    batch, heads, capacity, dim = contiguous.shape
    paged = contiguous.new_full((batch * capacity // page_size, heads, page_size, dim), torch.nan)
    for b, row in enumerate(table):
        for page, part in zip(row, contiguous[b].split(page_size, dim=1), strict=True):
            if page != _FAR_PAGE:
                paged[page] = part
    return paged
