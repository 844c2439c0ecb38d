"""What `python -m fastattn validate` checks, as data: each feature once, then combinations of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cache:
    """The key/value cache of a case.

    capacity: positions per sequence. lengths: keys in it before the call. new: keys that the call appends.
    page_size: 0 = contiguous. rotary_dim: 0 = no rotary embedding.
    """

    capacity: int
    lengths: tuple[int, ...]
    new: int = 0
    page_size: int = 0
    rotary_dim: int = 0
    interleaved: bool = False


@dataclass(frozen=True)
class Case:
    """One call to check.

    kind: "dense", "varlen", "cache", "merge" (attention over parts of the keys, merged) or "dropout mask".
    heads, seqlens, head_dims: (of q, of k and v), (of q, of k and v), (of q and k, of v).
    mask, bias: shapes in letters, b h q k for the sizes and 1 for broadcasting: "b11k", "qk".
    alibi: the shape of the slopes, "h" or "bh".
    kv_lengths: keys behind them are NaN.
    q_offset: the position of each sequence's first query.
    lengths: of the sequences of a varlen call, (queries, keys); spare: unused rows behind the last one.
    layout: how q, k and v lie in memory, a name in `fastattn.cli.validate.data.LAYOUTS`.
    mean: size of what the keys of a head have in common, and the values; no gradient comes through lse then.
    detail: every quantity gets a line in the table, not the worst alone.
    repeat: the results must be the same bits in a second run, with another number of threads.
    """

    section: str
    name: str
    kind: str = "dense"
    batch: int = 2
    heads: tuple[int, int] = (4, 4)
    seqlens: tuple[int, int] = (33, 47)
    head_dims: tuple[int, int] = (32, 32)
    options: Mapping[str, Any] = field(default_factory=dict)
    mask: str | None = None
    hidden_rows: bool = False
    bias: str | None = None
    minus_inf: bool = False
    alibi: str | None = None
    sinks: bool = False
    kv_lengths: tuple[int, ...] | None = None
    q_offset: tuple[int, ...] | None = None
    lengths: tuple[tuple[int, int], ...] = ()
    spare: int = 0
    cache: Cache | None = None
    layout: str = "contiguous"
    mean: float = 0.0
    detail: bool = False
    repeat: bool = False


def _options(name: str, **options: Any) -> Case:
    return Case("options", name, options=options)


OPTIONS = (
    Case("options", "forward and backward", detail=True),
    _options("causal", causal=True),
    _options("causal, top-left", causal=True, causal_alignment="top-left"),
    _options("window (7, 3)", window=(7, 3)),
    _options("window (7, open)", window=(7, None)),
    _options("window (open, 2)", window=(None, 2)),
    _options("window (7, 3), top-left", window=(7, 3), causal_alignment="top-left"),
    _options("window, causal", window=(7, 3), causal=True),
    _options("scale", scale=0.3),
    _options("softcap", softcap=1.5),
    Case("options", "mask, one for all", mask="qk"),
    Case("options", "mask of keys", mask="b11k"),
    Case("options", "mask of everything", mask="bhqk"),
    Case("options", "bias, one for all", bias="qk", detail=True),
    Case("options", "bias of keys", bias="b11k"),
    Case("options", "bias of heads", bias="h11"),
    Case("options", "bias of everything", bias="bhqk"),
    Case("options", "ALiBi", alibi="h"),
    Case("options", "ALiBi of each sequence", alibi="bh"),
    Case("options", "sinks", sinks=True, detail=True),
    Case("options", "kv_lengths", kv_lengths=(47, 30)),
    Case("options", "kv_lengths, causal", kv_lengths=(41, 35), options={"causal": True}),
    Case("options", "q_offset", q_offset=(9, -5), options={"causal": True, "window": (20, None)}),
    _options("dropout", dropout_p=0.25, seed=17),
    Case("options", "keys that are alike", mean=3.0, seqlens=(33, 200), head_dims=(64, 64)),
    Case("options", "merge_states", kind="merge"),
    Case("options", "the same bits twice", repeat=True, options={"causal": True}),
)

HEADS = (
    Case("heads", "grouped queries, 6 on 2", heads=(6, 2)),
    Case("heads", "multi-query, 5 on 1", heads=(5, 1)),
    Case("heads", "one head", heads=(1, 1)),
    *(Case("heads", f"head_dim {d}", head_dims=(d, d)) for d in (1, 3, 8, 40, 64, 72, 100, 128, 192, 256)),
    Case("heads", "head_dim_v narrower", head_dims=(64, 24)),
    Case("heads", "head_dim_v wider", head_dims=(24, 72)),
)

SIZES = (
    *(
        Case("sizes", f"{queries} x {keys}", seqlens=(queries, keys), options={"causal": True})
        for queries, keys in ((1, 1), (1, 257), (2, 3), (17, 63), (65, 129), (127, 128), (200, 257))
    ),
    Case("sizes", "no batch", batch=0),
    Case("sizes", "no heads", heads=(0, 0)),
    Case("sizes", "no queries", seqlens=(0, 47)),
    Case("sizes", "no keys", seqlens=(33, 0)),
    Case("sizes", "head_dim 0", head_dims=(0, 32)),
    Case("sizes", "head_dim_v 0", head_dims=(32, 0)),
)

HIDDEN = (
    Case("hidden rows", "more queries than keys", seqlens=(47, 33), options={"causal": True}),
    Case("hidden rows", "rows masked out", mask="bhqk", hidden_rows=True),
    Case("hidden rows", "rows masked out, sinks", mask="bhqk", hidden_rows=True, sinks=True),
    Case("hidden rows", "bias of -inf", bias="bhqk", minus_inf=True),
    Case("hidden rows", "a sequence without keys", kv_lengths=(0, 47)),
    Case("hidden rows", "window past the keys", seqlens=(47, 5), options={"window": (2, 2)}),
)

LAYOUTS = (
    Case("memory", "(batch, seqlen, heads, dim)", layout="bshd"),
    Case("memory", "slices of packed qkv", layout="packed", seqlens=(33, 33)),
    Case("memory", "expanded keys", layout="expanded"),
    Case("memory", "head_dim not innermost", layout="transposed"),
    Case("memory", "inside a larger tensor", layout="inside"),
    Case("memory", "every second row", layout="strided"),
)

COMBINATIONS = (
    Case(
        "combinations",
        "causal, GQA, bias, dropout",
        heads=(6, 2),
        bias="1hqk",
        options={"causal": True, "dropout_p": 0.1},
    ),
    Case(
        "combinations",
        "window, softcap, ALiBi, sinks",
        alibi="h",
        sinks=True,
        options={"window": (9, 4), "softcap": 2.0},
    ),
    Case("combinations", "mask, bias, kv_lengths", mask="b1qk", bias="h11", kv_lengths=(40, 47)),
    Case(
        "combinations",
        "sinks, dropout, hidden rows",
        sinks=True,
        mask="bhqk",
        hidden_rows=True,
        options={"dropout_p": 0.5},
    ),
    Case(
        "combinations",
        "everything at once",
        heads=(6, 2),
        seqlens=(40, 65),
        head_dims=(40, 24),
        options={"causal": True, "window": (30, None), "softcap": 3.0, "dropout_p": 0.2, "scale": 0.2},
        mask="b1qk",
        bias="1hqk",
        alibi="bh",
        sinks=True,
        kv_lengths=(65, 33),
        layout="bshd",
        detail=True,
        repeat=True,
    ),
)

_RAGGED = ((5, 9), (33, 33), (0, 4), (1, 20))

VARLEN = (
    Case("varlen", "forward and backward", kind="varlen", lengths=_RAGGED, detail=True),
    Case("varlen", "causal", kind="varlen", lengths=_RAGGED, options={"causal": True}),
    Case(
        "varlen",
        "causal, top-left",
        kind="varlen",
        lengths=_RAGGED,
        options={"causal": True, "causal_alignment": "top-left"},
    ),
    Case(
        "varlen",
        "window, grouped queries",
        kind="varlen",
        heads=(6, 2),
        lengths=_RAGGED,
        options={"window": (3, 1)},
    ),
    Case("varlen", "unused rows", kind="varlen", lengths=((3, 5), (8, 2)), spare=4, options={"causal": True}),
    Case(
        "varlen",
        "everything at once",
        kind="varlen",
        lengths=_RAGGED,
        heads=(4, 2),
        options={"causal": True, "window": (9, None), "softcap": 3.0, "dropout_p": 0.2, "seed": 3},
        mask="b1qk",
        bias="bhqk",
        alibi="bh",
        sinks=True,
        kv_lengths=(9, 20, 4, 20),
    ),
)


def _cached(name: str, cache: Cache, **fields: Any) -> Case:
    fields = {"heads": (6, 2), "seqlens": (1, cache.capacity), "options": {"causal": True}, **fields}
    return Case("kv cache", name, kind="cache", cache=cache, **fields)


KV_CACHE = (
    _cached("one query, contiguous", Cache(64, (13, 64))),
    _cached("append, contiguous", Cache(64, (13, 63), new=1)),
    _cached("a chunk of 7, contiguous", Cache(64, (0, 41), new=7), seqlens=(7, 64)),
    _cached("one query, paged", Cache(64, (13, 64), page_size=16)),
    _cached("append, paged", Cache(64, (15, 32), new=5, page_size=16), seqlens=(5, 64)),
    _cached("page size 1", Cache(20, (3, 11), new=2, page_size=1), seqlens=(2, 20)),
    _cached("rotary", Cache(64, (13, 40), new=3, rotary_dim=32), seqlens=(3, 64)),
    _cached(
        "rotary, interleaved, partial",
        Cache(64, (13, 40), new=3, rotary_dim=20, interleaved=True),
        seqlens=(3, 64),
    ),
    _cached("rotary, paged", Cache(64, (31, 2), new=3, page_size=16, rotary_dim=32), seqlens=(3, 64)),
    _cached(
        "everything at once, paged",
        Cache(48, (20, 0), new=4, page_size=8, rotary_dim=16),
        seqlens=(4, 48),
        options={"causal": True, "window": (11, None), "softcap": 2.0, "scale": 0.25},
        mask="b11k",
        bias="1hqk",
        alibi="h",
        sinks=True,
    ),
)

DROPOUT_MASK = (
    Case("dropout mask", "dense, bit for bit", kind="dropout mask", seqlens=(17, 17), head_dims=(8, 17)),
    Case(
        "dropout mask",
        "varlen, bit for bit",
        kind="dropout mask",
        seqlens=(17, 17),
        head_dims=(8, 17),
        lengths=((17, 17), (17, 17)),
    ),
)

CASES = (*OPTIONS, *HEADS, *SIZES, *HIDDEN, *LAYOUTS, *COMBINATIONS, *VARLEN, *KV_CACHE, *DROPOUT_MASK)
