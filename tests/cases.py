"""The calls that every backend must compute, as data, and the tensors they stand for.

A `Case` is a dense or varlen call described by sizes and options; `build` turns it into a `Call` with tensors. The
lists name each feature once, each pair of features once, sizes around tile edges, head dimensions, empty tensors and
memory layouts. They are lists and not products: a new backend runs all of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fastattn

from . import eager, oracle
from .tolerance import to_numpy

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Window = tuple[int | None, int | None] | None


@dataclass(frozen=True)
class Case:
    """One call. mask and bias are broadcast forms: "b1qk" is (batch, 1, seqlen_q, seqlen_k), "" has no dimensions."""

    name: str
    batch: int = 2
    heads_q: int = 2
    heads_kv: int = 2
    seqlen_q: int = 37
    seqlen_k: int = 83
    head_dim: int = 24
    head_dim_v: int = 24
    lengths: tuple[tuple[int, int], ...] | None = None  # varlen: (queries, keys) of each sequence
    spare: tuple[int, int] = (0, 0)  # varlen: queries and keys behind the last sequence
    causal: bool = False
    window: Window = None
    causal_alignment: str = "bottom-right"
    mask: str | None = None
    hidden_rows: tuple[int, ...] = ()  # queries that the mask (which must have a "q") hides everything from
    bias: str | None = None
    alibi: str | None = None  # "h" or "bh"
    softcap: float | None = None
    sinks: bool = False
    kv_lengths: tuple[int, ...] | None = None
    q_offset: tuple[int, ...] | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    seed: int = 0x1234_5678_9ABC_DEF0
    layout: str = "bhsd"
    extras_dtype: torch.dtype | None = None  # of bias and sinks; None = q's
    mean: float = 0.0  # size of what all keys of a head have in common, and all values
    small_values: bool = False  # v is so small that float16 barely has what rounding takes from out

    def __str__(self) -> str:
        return self.name

    @property
    def sizes(self) -> dict[str, int]:
        """The letters of the broadcast forms."""
        if self.lengths is None:
            return {"b": self.batch, "h": self.heads_q, "q": self.seqlen_q, "k": self.seqlen_k, "1": 1}
        longest = [max((pair[side] for pair in self.lengths), default=0) for side in (0, 1)]
        return {"b": len(self.lengths), "h": self.heads_q, "q": longest[0], "k": longest[1], "1": 1}


@dataclass
class Call:
    """The tensors and keyword arguments of a case."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    cu_seqlens: tuple[Tensor, Tensor] | None = None
    leaves: dict[str, Tensor] = field(default_factory=dict)  # what has a gradient

    def __post_init__(self) -> None:
        self.leaves = {"q": self.q, "k": self.k, "v": self.v}
        self.leaves |= {n: self.options[n] for n in ("bias", "sinks") if n in self.options}

    def run(self, **more: Any) -> Any:
        """Calls fastattn."""
        function = fastattn.attention if self.cu_seqlens is None else fastattn.attention_varlen
        return function(self.q, self.k, self.v, *(self.cu_seqlens or ()), **self.options, **more)

    def explain(self, **more: Any) -> fastattn.Report:
        """What fastattn says about the call."""
        cu = {} if self.cu_seqlens is None else dict(zip(CU_SEQLENS, self.cu_seqlens, strict=True))
        return fastattn.explain(self.q, self.k, self.v, **cu, **self.options, **more)

    def requires_grad(self) -> dict[str, Tensor]:
        """Lets all leaves require grad, and returns them."""
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        return self.leaves


CU_SEQLENS = ("cu_seqlens_q", "cu_seqlens_k")


# ---------------------------------------------------------------------------------------------------------- building


def build(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Call:
    """The tensors of a case; the same numbers each time, rounded to dtype."""
    random = torch.Generator().manual_seed(sum(map(ord, case.name)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype)

    q, k, v = LAYOUTS[case.layout](case, normal)
    if case.mean:
        rows = 0 if case.lengths else 2  # the dimension of positions
        k, v = (x + case.mean * normal(*x.shape).narrow(rows, 0, 1) for x in (k, v))
    if case.small_values:
        v = v * 2.0**-8
    extras_dtype = case.extras_dtype or dtype
    names = ("causal", "window", "causal_alignment", "softcap", "scale")
    options: dict[str, Any] = {name: getattr(case, name) for name in names}
    if case.mask is not None:
        mask = torch.rand(form_shape(case, case.mask), generator=random) < 0.7
        for row in case.hidden_rows:
            mask.select(case.mask.index("q") - len(case.mask), row).fill_(False)
        options["mask"] = mask.to(device)
    if case.bias is not None:
        bias = normal(*form_shape(case, case.bias)).to(extras_dtype)
        options["bias"] = bias[:1].expand(bias.shape) if case.layout == "expanded" and bias.ndim else bias
    if case.alibi is not None:
        slopes = 0.3 * torch.rand(form_shape(case, case.alibi), generator=random)
        options["alibi_slopes"] = slopes.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    if case.sinks:
        options["sinks"] = normal(case.heads_q).to(extras_dtype)
    for name in ("kv_lengths", "q_offset"):
        if (numbers := getattr(case, name)) is not None:
            options[name] = torch.tensor(numbers, dtype=torch.int32, device=device)
    if case.dropout_p:
        options |= {"dropout_p": case.dropout_p, "seed": case.seed}
    cu_seqlens = cumulative_lengths(case, device)
    if case.layout == "scattered":
        options = {name: scattered(x) if isinstance(x, Tensor) else x for name, x in options.items()}
        cu_seqlens = cu_seqlens and (scattered(cu_seqlens[0]), scattered(cu_seqlens[1]))
    return Call(case, q, k, v, options, cu_seqlens)


def form_shape(case: Case, form: str) -> tuple[int, ...]:
    """The shape that a broadcast form spells."""
    return tuple(case.sizes[letter] for letter in form)


def cumulative_lengths(case: Case, device: str) -> tuple[Tensor, Tensor] | None:
    """cu_seqlens_q and cu_seqlens_k of a varlen case."""
    if case.lengths is None:
        return None
    ends = ([0, *itertools.accumulate(pair[side] for pair in case.lengths)] for side in (0, 1))
    cu_q, cu_k = (torch.tensor(end, dtype=torch.int32, device=device) for end in ends)
    return cu_q, cu_k


def scattered(x: Tensor) -> Tensor:
    """The same values in memory with gaps between the elements of every dimension, at an odd address."""
    gap = torch.nan if x.is_floating_point() else 1
    view = x.new_full([2 * size + 1 for size in x.shape], gap)[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


# --------------------------------------------------------------------------------------------------- memory layouts

Normal = Callable[..., Tensor]


def _shapes(case: Case) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    if case.lengths is None:
        q, k = (case.batch, case.heads_q, case.seqlen_q), (case.batch, case.heads_kv, case.seqlen_k)
    else:
        totals = [sum(pair[side] for pair in case.lengths) + case.spare[side] for side in (0, 1)]
        q, k = (totals[0], case.heads_q), (totals[1], case.heads_kv)
    return (*q, case.head_dim), (*k, case.head_dim), (*k, case.head_dim_v)


def _contiguous(case: Case, normal: Normal) -> tuple[Tensor, ...]:
    return tuple(normal(*shape) for shape in _shapes(case))


def _swapped(first: int, second: int) -> Callable[[Case, Normal], tuple[Tensor, ...]]:
    """Two dimensions exchanged in memory."""

    def layout(case: Case, normal: Normal) -> tuple[Tensor, ...]:
        return tuple(
            x.transpose(first, second).contiguous().transpose(first, second) for x in _contiguous(case, normal)
        )

    return layout


def _packed(case: Case, normal: Normal) -> tuple[Tensor, ...]:
    """Slices of one projection: (batch, seqlen, 3, heads, head_dim), or (total, 3, heads, head_dim) for varlen."""
    if case.lengths is None:
        qkv = normal(case.batch, case.seqlen_q, 3, case.heads_q, case.head_dim)
        return tuple(x.transpose(1, 2) for x in qkv.unbind(2))
    return normal(_shapes(case)[0][0], 3, case.heads_q, case.head_dim).unbind(1)


def _expanded(case: Case, normal: Normal) -> tuple[Tensor, ...]:
    """q shared by the batch, k by the heads, v by both."""
    q, k, v = _shapes(case)
    return normal(1, *q[1:]).expand(q), normal(k[0], 1, *k[2:]).expand(k), normal(1, 1, *v[2:]).expand(v)


def _scattered(case: Case, normal: Normal) -> tuple[Tensor, ...]:
    return tuple(scattered(x) for x in _contiguous(case, normal))


def _padded_rows(case: Case, normal: Normal) -> tuple[Tensor, ...]:
    """Rows of an odd stride at an odd offset: no vector load is aligned."""

    def pad(x: Tensor) -> Tensor:
        big = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
        return big[..., 1:-2].copy_(x)

    return tuple(pad(x) for x in _contiguous(case, normal))


LAYOUTS: dict[str, Callable[[Case, Normal], tuple[Tensor, ...]]] = {
    "bhsd": _contiguous,
    "bshd": _swapped(1, 2),  # (batch, seqlen, heads, head_dim) in memory, as a projection leaves it
    "sbhd": _swapped(0, 2),
    "bhds": _swapped(-1, -2),  # head_dim is not innermost
    "htd": _swapped(0, 1),  # varlen, heads first in memory
    "packed": _packed,
    "expanded": _expanded,
    "scattered": _scattered,
    "padded rows": _padded_rows,
}


# ------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Expected:
    """What a case must give, with cotangents for out and lse, and what eager PyTorch gives in the same dtype."""

    dout: Tensor
    dlse: Tensor
    exact: oracle.Result
    eager_out: Tensor
    eager_lse: Tensor
    eager_grads: dict[str, Tensor]


@functools.cache
def expected(case: Case, dtype: torch.dtype) -> Expected:
    """Evaluated once, for all backends and tests."""
    call = build(case, dtype)
    random = torch.Generator().manual_seed(99)
    shape = (*call.q.shape[:-1], case.head_dim_v)
    rows = shape[:-1] if case.lengths is None else (shape[1], shape[0])
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    dout = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
    dlse = torch.randn(rows, generator=random, dtype=torch.float64).to(lse_dtype)
    if case.mean:
        dlse.zero_()  # it would drown what such cases look at

    cotangents = {"dout": to_numpy(dout), "dlse": to_numpy(dlse)}
    exact = evaluate(oracle, as_arrays(call), **cotangents)
    # lse is never rounded to a low precision, so its yardstick is not either.
    wide = replace_tensors(call, lambda x: x.to(lse_dtype) if x.is_floating_point() else x)
    _, eager_lse = evaluate(eager, wide)
    leaves = call.requires_grad()
    out, lse = evaluate(eager, call)
    # A row that sees nothing has lse = -inf, which no gradient may pass.
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    grads = torch.autograd.grad(
        (out, lse), list(leaves.values()), (dout, dlse.to(dtype)), allow_unused=True, materialize_grads=True
    )
    return Expected(dout, dlse, exact, out.detach(), eager_lse, dict(zip(leaves, grads, strict=True)))


def evaluate(module: Any, call: Call, **more: Any) -> Any:
    """A call by the functions `dense` and `varlen` of `oracle` or `eager`."""
    if call.cu_seqlens is None:
        return module.dense(call.q, call.k, call.v, **call.options, **more)
    cu_q, cu_k = (cu.tolist() for cu in call.cu_seqlens)
    return module.varlen(call.q, call.k, call.v, cu_q, cu_k, **call.options, **more)


def replace_tensors(call: Call, change: Callable[[Tensor], Any]) -> Call:
    """The call with every tensor changed, but for cu_seqlens."""
    options = {name: change(x) if isinstance(x, Tensor) else x for name, x in call.options.items()}
    return Call(call.case, change(call.q), change(call.k), change(call.v), options, call.cu_seqlens)


def as_arrays(call: Call) -> Call:
    """The call's tensors as NumPy arrays, floating point ones in float64."""
    return replace_tensors(call, lambda x: to_numpy(x) if x.is_floating_point() else x.cpu().numpy())


# ------------------------------------------------------------------------------------------------------------- lists

GQA = {"heads_q": 6, "heads_kv": 2}

FEATURES = (
    Case("plain"),
    Case("causal", causal=True),
    Case("causal top-left", causal=True, causal_alignment="top-left"),
    Case("causal, more queries than keys", seqlen_q=83, seqlen_k=37, causal=True),
    Case("causal top-left, more queries than keys", seqlen_q=83, seqlen_k=37, causal=True, causal_alignment="top-left"),
    Case("window left", window=(5, None)),
    Case("window right", window=(None, 3)),
    Case("window both", window=(7, 2)),
    Case("window (0, 0)", window=(0, 0)),
    Case("window wider than the keys", window=(500, 500)),
    Case("window top-left", window=(7, 2), causal_alignment="top-left"),
    Case("window top-left past the keys", seqlen_q=83, seqlen_k=17, window=(7, 2), causal_alignment="top-left"),
    Case("window, more queries than keys", seqlen_q=83, seqlen_k=37, window=(7, 2)),
    Case("causal and window left", causal=True, window=(9, None)),
    Case("causal narrows window right", causal=True, window=(9, 4)),
    Case("causal keeps window (0, 0)", causal=True, window=(0, 0)),
    Case("mask bhqk", mask="bhqk"),
    Case("mask b1qk", mask="b1qk"),
    Case("mask 1hqk", mask="1hqk"),
    Case("mask b11k, padding", mask="b11k"),
    Case("mask bhq1, whole rows", mask="bhq1"),
    Case("mask hqk", mask="hqk"),
    Case("mask qk", mask="qk"),
    Case("mask k", mask="k"),
    Case("mask hides rows", mask="11qk", hidden_rows=(0, 3, 36)),
    Case("bias bhqk", bias="bhqk"),
    Case("bias b1qk", bias="b1qk"),
    Case("bias 1hqk", bias="1hqk"),
    Case("bias b11k", bias="b11k"),
    Case("bias bh1k", bias="bh1k"),
    Case("bias bhq1", bias="bhq1"),
    Case("bias 1h11", bias="1h11"),
    Case("bias hqk", bias="hqk"),
    Case("bias h1k", bias="h1k"),
    Case("bias qk", bias="qk"),
    Case("bias q1", bias="q1"),
    Case("bias k", bias="k"),
    Case("bias 1", bias="1"),
    Case("bias k, many queries", batch=1, seqlen_q=150, bias="k"),
    Case("bias h1k, many queries, causal", batch=1, seqlen_q=150, seqlen_k=70, bias="h1k", causal=True),
    Case("bias without dimensions", bias=""),
    Case("alibi per head", alibi="h"),
    Case("alibi per batch and head", alibi="bh"),
    Case("alibi top-left", alibi="h", causal_alignment="top-left"),
    Case("softcap", softcap=1.5),
    Case("softcap small", softcap=0.2),
    Case("softcap large", softcap=1e3),
    Case("softcap enormous", softcap=1e6),
    Case("sinks", sinks=True),
    Case("kv_lengths", kv_lengths=(51, 83)),
    Case("kv_lengths 0 and 1", kv_lengths=(0, 1)),
    Case("q_offset", q_offset=(20, 46), causal=True),
    Case("q_offset before the keys", q_offset=(-20, -60), causal=True, sinks=True),
    Case("q_offset past the keys", q_offset=(80, 2000), window=(9, 3), bias="1hqk"),
    Case("q_offset at its bounds", q_offset=(-(2**28), 2**28), window=(2**28 + 20, 2**28 + 50)),
    Case("q_offset, ALiBi", q_offset=(-7, 90), alibi="bh"),
    Case("q_offset, dropout", q_offset=(-3, 50), dropout_p=0.4),
    Case("scale", scale=0.5),
    Case("scale 0", scale=0.0),
    Case("scale negative", scale=-0.7),
    # A bias may be added before or after the scale is applied, and to keys that a step sees whole or in part.
    Case("bias, small scale", bias="bhqk", scale=0.01),
    Case("bias, large scale", bias="bhqk", scale=8.0),
    Case("bias and ALiBi, blocks whole and cut", seqlen_q=70, seqlen_k=600, bias="1hqk", alibi="h", causal=True),
    Case("mask over several blocks", seqlen_q=70, seqlen_k=600, mask="11qk", hidden_rows=(0, 69)),
    Case("dropout", dropout_p=0.3),
    Case("dropout of almost all", dropout_p=0.95),
    Case("GQA", **GQA),
    Case("MQA", heads_q=5, heads_kv=1),
    Case("one head", heads_q=1, heads_kv=1, batch=1),
    Case("head_dim_v smaller", head_dim_v=7),
    Case("head_dim_v larger", head_dim_v=50),
    *(
        Case(f"bias and sinks in {dtype}", bias="1hqk", sinks=True, extras_dtype=dtype)
        for dtype in (torch.float32, torch.float64, torch.float16)
    ),
)

# What is combined pairwise; no two of them set the same field.
_COMBINED: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (11, 4)},
    "top-left": {"causal_alignment": "top-left"},
    "mask": {"mask": "b1qk", "hidden_rows": (5,)},
    "bias": {"bias": "1hqk"},
    "alibi": {"alibi": "h"},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": True},
    "kv_lengths": {"kv_lengths": (29, 11)},
    "q_offset": {"q_offset": (13, -4)},
    "scale": {"scale": 0.4},
    "dropout": {"dropout_p": 0.4},
    "GQA": GQA,
    "head_dim_v": {"head_dim_v": 12},
}
ALL_TOGETHER = {name: value for options in _COMBINED.values() for name, value in options.items()}

BOTTOM_RIGHT: dict[str, Any] = {"causal_alignment": "bottom-right", "q_offset": None}

PAIRS = tuple(
    Case(f"{first} + {second}", seqlen_q=19, seqlen_k=35, **_COMBINED[first], **_COMBINED[second])
    for first, second in itertools.combinations(_COMBINED, 2)
)

COMBINATIONS = (
    Case("everything, q_offset", seqlen_q=19, seqlen_k=35, **ALL_TOGETHER),
    Case("everything, bottom-right", seqlen_q=19, seqlen_k=35, **ALL_TOGETHER | BOTTOM_RIGHT),
    Case("everything but causal", seqlen_q=35, seqlen_k=35, **ALL_TOGETHER | {"causal": False, "q_offset": None}),
    Case("everything aligned top-left", seqlen_q=19, seqlen_k=35, **ALL_TOGETHER | {"q_offset": None}),
)

_ODD = (1, 2, 3, 17, 63, 65, 127, 129, 200, 257)
SIZES = (
    *(Case(f"{n} x {n}", batch=1, seqlen_q=n, seqlen_k=n, head_dim=16, head_dim_v=16, causal=True) for n in _ODD),
    *(
        Case(f"{m} x {n}", batch=1, seqlen_q=m, seqlen_k=n, head_dim=16, head_dim_v=16, causal=True, sinks=True, **GQA)
        for m, n in ((1, 257), (257, 1), (2, 3), (3, 2), (17, 63), (65, 17), (129, 127), (63, 200), (200, 65))
    ),
)

_DIMS = (1, 2, 3, 5, 7, 8, 15, 16, 20, 32, 33, 40, 64, 65, 80, 96, 100, 128, 129, 160, 192, 200, 255, 256)
_UNEQUAL_DIMS = ((1, 256), (256, 1), (64, 128), (192, 128), (72, 33), (33, 72))
HEAD_DIMS = tuple(
    Case(f"head_dim {d}, {dv}", batch=1, seqlen_q=17, seqlen_k=33, head_dim=d, head_dim_v=dv, window=(20, 5))
    for d, dv in (*((d, d) for d in _DIMS), *_UNEQUAL_DIMS)
)

# Sizes that are no multiple of a batch or head count: the dropout counter and GQA order must not mix them up.
HEADS = tuple(
    Case(f"batch {b}, heads {hq}/{hkv}", b, hq, hkv, 5, 9, 8, 8, dropout_p=0.5, alibi="bh", sinks=True)
    for b, hq, hkv in ((1, 1, 1), (3, 1, 1), (1, 7, 7), (3, 6, 3), (2, 8, 1), (5, 6, 2), (2, 12, 4))
)

_EMPTY_OPTIONS: dict[str, Any] = {"bias": "bhqk", "mask": "b1qk", "sinks": True, "alibi": "h", "dropout_p": 0.2}
EMPTY = tuple(
    replace(Case(f"no {name}", causal=True, softcap=2.0, **_EMPTY_OPTIONS), **sizes)
    for name, sizes in (
        ("batch", {"batch": 0}),
        ("heads", {"heads_q": 0, "heads_kv": 0}),
        ("query heads", {"heads_q": 0, "heads_kv": 2}),
        ("queries", {"seqlen_q": 0}),
        ("keys", {"seqlen_k": 0}),
        ("queries and keys", {"seqlen_q": 0, "seqlen_k": 0}),
        ("head_dim", {"head_dim": 0}),
        ("head_dim_v", {"head_dim_v": 0}),
        ("head_dim and head_dim_v", {"head_dim": 0, "head_dim_v": 0}),
    )
)

NOTHING_SEEN = (
    Case("mask hides all", mask="qk", hidden_rows=tuple(range(37))),
    Case("mask hides all, sinks", mask="qk", hidden_rows=tuple(range(37)), sinks=True, bias="qk"),
    Case("kv_lengths 0", kv_lengths=(0, 0), sinks=True, softcap=1.0),
    Case("first rows, causal", seqlen_q=60, seqlen_k=20, causal=True, sinks=True, bias="1hqk", alibi="h"),
    Case(
        "last rows, window top-left", seqlen_q=60, seqlen_k=20, window=(3, 0), causal_alignment="top-left", sinks=True
    ),
    Case("window left of every key", seqlen_q=60, seqlen_k=20, window=(2, 0), **GQA),
    Case("scattered rows and lengths", mask="bhqk", hidden_rows=(0, 7, 8, 31), kv_lengths=(0, 12), dropout_p=0.2),
)

LAYOUT_CASES = (
    *(
        Case(f"layout {name}", seqlen_q=21, seqlen_k=21, layout=name, causal=True, bias="bhqk")
        for name in ("bshd", "sbhd", "bhds", "packed", "expanded", "scattered", "padded rows")
    ),
    Case("everything scattered", seqlen_q=21, seqlen_k=30, layout="scattered", **ALL_TOGETHER),
    *(
        Case(f"layout {name}, GQA", seqlen_q=21, seqlen_k=30, head_dim_v=13, layout=name, mask="bhqk", **GQA)
        for name in ("bshd", "sbhd", "bhds", "expanded", "scattered", "padded rows")
    ),
)

DENSE = (*FEATURES, *PAIRS, *COMBINATIONS, *SIZES, *HEAD_DIMS, *HEADS, *EMPTY, *NOTHING_SEEN, *LAYOUT_CASES)

ALIKE = (
    Case("alike", mean=2.0, seqlen_k=200, head_dim=64, head_dim_v=64),
    Case("alike, options", mean=2.0, seqlen_k=200, scale=0.02, causal=True, sinks=True, bias="11qk", **GQA),
    Case("alike, small", mean=2.0, seqlen_k=200, head_dim=64, head_dim_v=64, small_values=True),
    Case("alike, few queries", mean=2.0, seqlen_q=2, seqlen_k=200, head_dim=64, head_dim_v=64),
    Case("alike, few queries and many keys", mean=2.0, seqlen_q=2, seqlen_k=1300, head_dim=64, head_dim_v=33),
    Case("alike, varlen", mean=4.0, lengths=((40, 170), (9, 150)), head_dim=64, head_dim_v=64),
)
"""The gradient of q must not depend on what keys have in common, as softmax does not."""

_RAGGED = ((7, 19), (1, 33), (23, 5), (12, 12))
VARLEN = (
    Case("varlen plain", lengths=_RAGGED),
    Case("varlen one sequence", lengths=((13, 21),), causal=True),
    Case("varlen no sequence", lengths=(), spare=(3, 4)),
    Case("varlen empty sequences", lengths=((0, 5), (4, 0), (0, 0), (3, 6)), causal=True, sinks=True, bias="1hqk"),
    Case("varlen nothing at all", lengths=((0, 0), (0, 0)), sinks=True),
    Case("varlen spare tokens", lengths=_RAGGED, spare=(3, 5), causal=True),
    Case("varlen top-left", lengths=_RAGGED, causal=True, causal_alignment="top-left"),
    Case("varlen window", lengths=_RAGGED, window=(4, 2), **GQA),
    Case("varlen kv_lengths", lengths=_RAGGED, kv_lengths=(9, 33, 0, 7), causal=True),
    Case("varlen sinks, softcap", lengths=_RAGGED, sinks=True, softcap=0.7),
    Case("varlen alibi h", lengths=_RAGGED, alibi="h"),
    Case("varlen alibi bh", lengths=_RAGGED, alibi="bh", causal=True),
    Case("varlen dropout", lengths=_RAGGED, dropout_p=0.4, **GQA),
    Case("varlen mask bhqk", lengths=_RAGGED, mask="bhqk"),
    Case("varlen mask b11k", lengths=_RAGGED, mask="b11k"),
    Case("varlen bias bhqk", lengths=_RAGGED, bias="bhqk"),
    Case("varlen bias 1hqk", lengths=_RAGGED, bias="1hqk"),
    Case("varlen bias bh11", lengths=_RAGGED, bias="bh11"),
    Case("varlen bias q1", lengths=_RAGGED, bias="q1"),
    Case("varlen bias k", lengths=_RAGGED, bias="k"),
    Case("varlen bias without dimensions", lengths=_RAGGED, bias=""),
    Case("varlen head_dim_v", lengths=_RAGGED, head_dim=20, head_dim_v=33, scale=0.3),
    Case("varlen packed", lengths=((7, 7), (12, 12), (1, 1)), layout="packed", causal=True),
    Case("varlen heads first in memory", lengths=_RAGGED, layout="htd", causal=True),
    Case("varlen scattered", lengths=_RAGGED, layout="scattered", bias="1hqk", **GQA),
    Case("varlen q_offset", lengths=_RAGGED, q_offset=(3, 20, -9, 0), causal=True, alibi="h"),
    Case(
        "varlen everything, q_offset",
        lengths=_RAGGED,
        spare=(2, 1),
        **ALL_TOGETHER | {"kv_lengths": (18, 20, 5, 0), "q_offset": (5, 30, -2, 4)},
    ),
    Case("varlen long", lengths=((129, 200), (65, 63), (1, 257)), causal=True, head_dim=16, head_dim_v=16),
    Case(
        "varlen everything",
        lengths=_RAGGED,
        spare=(2, 1),
        **ALL_TOGETHER | BOTTOM_RIGHT | {"kv_lengths": (18, 20, 5, 0)},
    ),
)
