"""One frozen, validated description of an attention call.

Every public function builds an `Inputs` (the tensors) and an `Options` (everything else) and turns them into a
`Problem` through `describe`. Whatever a user can get wrong about shapes, dtypes, devices and options is refused
there, before any memory is touched; the values inside small index tensors are checked by `check_values`.
Backends take a `Problem` and its `Inputs` and check nothing again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from typing_extensions import Required  # a requirement of torch itself

from .alignment import why_not_aligned

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ALIGNMENTS = ("bottom-right", "top-left")


class Inputs(NamedTuple):
    """The tensors of a call; their shapes are in `fastattn.attention` and its siblings.

    The first eleven are, in this order, the tensor arguments of the operator `fastattn::forward`.
    For a call with a cache, k and v are the caches and kv_lengths the keys in them *before* the call.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    kv_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seed: Tensor | None = None
    k_new: Tensor | None = None
    v_new: Tensor | None = None
    block_table: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The tensors that have gradients, in the order of DIFFERENTIABLE."""
        return self.q, self.k, self.v, self.bias, self.sinks


DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")


class Options(NamedTuple):
    """Everything of a call that is not a tensor, as the user gave it; in the order of the operators' schemas.

    The last one, the layout of the rotary tables, belongs to calls with a cache alone.
    """

    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    causal_alignment: str = "bottom-right"
    softcap: float | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    rotary_interleaved: bool = False


class _SharedOptions(TypedDict, total=False):
    causal: bool
    window: tuple[int | None, int | None] | None
    causal_alignment: str
    mask: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    scale: float | None


class AttentionOptions(_SharedOptions, total=False):
    """Keyword arguments of `fastattn.attention` and `attention_varlen`, except return_lse and backend."""

    kv_lengths: Tensor | None
    dropout_p: float
    seed: int | Tensor | None


class CacheOptions(_SharedOptions, total=False):
    """Keyword arguments of `fastattn.attention_with_kv_cache`, except return_lse and backend."""

    cache_lengths: Required[Tensor]
    k_new: Tensor | None
    v_new: Tensor | None
    block_table: Tensor | None
    rotary: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, bool] | None


@dataclass(frozen=True)
class Problem:
    """What is to be computed, without the data: hashable, printable, the input of every chooser.

    A varlen call has `batch` sequences; its seqlen_q and seqlen_k are the totals over all of them.
    A call with a cache has seqlen_k = the cache's capacity per sequence.
    """

    kind: str  # "dense", "varlen" or "cache"
    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device
    window_left: int | None  # keys to the left of the diagonal that a query sees; None = all
    window_right: int | None  # likewise to the right; 0 for causal
    bottom_right: bool  # the last query stands at the last key (else: the first at the first)
    softcap: float | None
    scale: float
    dropout_p: float
    seqlen_new: int  # keys appended to the cache by this call
    page_size: int  # 0 = contiguous cache
    rotary_dim: int  # 0 = no rotary embedding
    rotary_interleaved: bool
    features: frozenset[str]  # what the call uses beyond plain attention: "mask", "bias", "window", ...

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads_q // self.heads_kv if self.heads_kv else 1

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of scores, sums, lse and all intermediate results."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def dropout_threshold(self) -> int:
        """A probability is kept iff its 32-bit Philox word is at least this: floor(p * 2^32)."""
        return int(self.dropout_p * 2**32)


class Meta(NamedTuple):
    """What `describe` needs to know of a tensor; hashable, so that a description is made once per signature."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device


# How the arguments of a call are named in messages, where the function's own names differ from those of Inputs.
CACHE_NAMES = {"k": "k_cache", "v": "v_cache", "kv_lengths": "cache_lengths", "cos": "rotary.cos", "sin": "rotary.sin"}


def describe(kind: str, inputs: Inputs, options: Options, *, cached: bool = True) -> Problem:
    """Checks types, devices, dtypes, shapes and options, in this order, and describes the call.

    `cached` must be False when sizes may be symbolic (under tracing), as those cannot be dictionary keys.
    Raises TypeError or ValueError naming the argument, what came and what was expected.
    """
    check_tensors(kind, inputs)
    # Not part of the cached description, whose key cannot tell 1 from 1.0 or True and must be hashable.
    check_option_types(options)
    metas = tuple([None if t is None else Meta(t.shape, t.dtype, t.device) for t in inputs])
    if not cached:
        return _describe(kind, metas, options)
    # A cache is too large to be copied: which backend can use it depends on how it lies in memory.
    unaligned = kind == "cache" and any(map(why_not_aligned, (inputs.k, inputs.v)))
    return _describe_cached(kind, metas, options, unaligned)


_REQUIRED = ("q", "k", "v")


def check_tensors(kind: str, inputs: Inputs) -> None:
    """Every tensor argument must be a dense tensor; all but q, k and v may be None."""
    for field, x in zip(Inputs._fields, inputs, strict=True):
        if x is None and field not in _REQUIRED:
            continue
        name = CACHE_NAMES.get(field, field) if kind == "cache" else field
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested:
            kind_of = "a nested tensor" if x.is_nested else f"layout {x.layout}"
            raise TypeError(f"{name} must be a dense (strided) tensor, got {kind_of}")


def _describe(kind: str, metas: tuple[Meta | None, ...], options: Options, unaligned: bool = False) -> Problem:
    names = CACHE_NAMES if kind == "cache" else {}
    check_devices(metas, names)
    check_dtypes(metas, names)
    m: Any = Inputs(*metas)  # type: ignore[arg-type]  # the same fields, holding shapes instead of tensors
    sizes = _SIZES[kind](m)
    batch, heads_q = sizes["batch"], sizes["heads_q"]
    rows, cols = (None, None) if kind == "varlen" else (sizes["seqlen_q"], sizes["seqlen_k"])
    for name, meta in (("mask", m.mask), ("bias", m.bias)):
        if meta is not None:
            check_broadcast(name, meta.shape, (batch, heads_q, rows, cols))
    if m.alibi_slopes is not None and tuple(m.alibi_slopes.shape) not in ((heads_q,), (batch, heads_q)):
        raise ValueError(
            f"alibi_slopes must have shape (heads_q,) = ({heads_q},) or (batch, heads_q) = ({batch}, {heads_q}), "
            f"got {tuple(m.alibi_slopes.shape)}"
        )
    if m.sinks is not None:
        check_shape("sinks", m.sinks.shape, (heads_q,), "(heads_q,)")
    if m.kv_lengths is not None:
        check_shape(names.get("kv_lengths", "kv_lengths"), m.kv_lengths.shape, (batch,), "(batch,)")
    check_options(options)

    scale = options.scale
    if scale is None:
        scale = 1.0 / math.sqrt(sizes["head_dim"]) if sizes["head_dim"] > 0 else 1.0
    window_left, window_right = _reach(options.window_left), _reach(options.window_right)
    used = {
        "mask": m.mask,
        "bias": m.bias,
        "alibi": m.alibi_slopes,
        "sinks": m.sinks,
        "kv_lengths": m.kv_lengths,
        "rotary": m.cos,
        "paged": m.block_table,
        "append": m.k_new,
        "unaligned cache": unaligned or None,
        "softcap": options.softcap,
        "window": window_left if window_left is not None else window_right,
        "causal": options.causal or None,
        "dropout": options.dropout_p or None,
        "gqa": True if sizes["heads_q"] != sizes["heads_kv"] else None,
        kind: True,
    }
    return Problem(
        kind=kind,
        dtype=m.q.dtype,
        device=m.q.device,
        window_left=window_left,
        window_right=0 if options.causal else window_right,
        bottom_right=options.causal_alignment == "bottom-right",
        softcap=options.softcap,
        scale=float(scale),
        dropout_p=float(options.dropout_p),
        seqlen_new=m.k_new.shape[2] if m.k_new is not None else 0,
        page_size=m.k.shape[2] if m.block_table is not None else 0,
        rotary_dim=2 * m.cos.shape[1] if m.cos is not None else 0,
        rotary_interleaved=options.rotary_interleaved,
        features=frozenset(name for name, value in used.items() if value is not None),
        **sizes,
    )


_describe_cached = lru_cache(maxsize=4096)(_describe)


def _reach(side: int | None) -> int | None:
    """A side of a window; None, open, if it reaches farther than any tensor (which sums of positions rely on)."""
    return None if side is None or side >= 2**48 else side


# ---------------------------------------------------------------------------------------------- devices and dtypes


def check_devices(metas: tuple[Meta | None, ...], names: dict[str, str]) -> None:
    """Every tensor must be where q is; only the seed stays on the CPU."""
    device = metas[0].device  # type: ignore[union-attr]
    for field, meta in zip(Inputs._fields, metas, strict=True):
        if meta is None or meta.device == device:
            continue
        if field == "seed":
            if meta.device.type not in ("cpu", "meta"):
                raise ValueError(f"seed must be an int or a CPU tensor, got a tensor on {meta.device}")
            continue
        raise ValueError(f"{names.get(field, field)} is on device {meta.device}, but q is on {device}")


_ONE_OF = "float32, float64, bfloat16 or float16"
_EXPECTED_DTYPES: dict[str, tuple[Any, str]] = {
    "mask": (lambda dtype: dtype == torch.bool, "torch.bool (True = attend); a float mask is passed as bias"),
    "bias": (lambda dtype: dtype in DTYPES, f"of floating point, {_ONE_OF}"),
    "alibi_slopes": (lambda dtype: dtype in DTYPES, f"of floating point, {_ONE_OF}"),
    "sinks": (lambda dtype: dtype in DTYPES, f"of floating point, {_ONE_OF}"),
    "cos": (lambda dtype: dtype in DTYPES, f"of floating point, {_ONE_OF}"),
    "sin": (lambda dtype: dtype in DTYPES, f"of floating point, {_ONE_OF}"),
    "kv_lengths": (lambda dtype: dtype == torch.int32, "torch.int32"),
    "cu_seqlens_q": (lambda dtype: dtype == torch.int32, "torch.int32"),
    "cu_seqlens_k": (lambda dtype: dtype == torch.int32, "torch.int32"),
    "block_table": (lambda dtype: dtype == torch.int32, "torch.int32"),
    "seed": (lambda dtype: dtype == torch.int64, "torch.int64"),
}


def check_dtypes(metas: tuple[Meta | None, ...], names: dict[str, str]) -> None:
    """q decides the dtype of k, v and the new keys; index tensors are int32."""
    dtype = metas[0].dtype  # type: ignore[union-attr]
    if dtype not in DTYPES:
        raise TypeError(f"q must have dtype {_ONE_OF}, got {dtype}")
    for field, meta in zip(Inputs._fields, metas, strict=True):
        if meta is None:
            continue
        name = names.get(field, field)
        if field in _EXPECTED_DTYPES:
            accepts, expected = _EXPECTED_DTYPES[field]
            if not accepts(meta.dtype):
                raise TypeError(f"{name} must have dtype {expected}, got {meta.dtype}")
        elif meta.dtype != dtype:
            raise TypeError(f"{name} has dtype {meta.dtype}, but q has {dtype}: they must be the same")


# ---------------------------------------------------------------------------------------------------------- shapes


def check_rank(name: str, shape: Sequence[int], expected: str) -> None:
    """`expected` spells the shape, as in '(batch, heads, seqlen, head_dim)'."""
    rank = expected.count(",") + 1
    if len(shape) != rank:
        raise ValueError(f"{name} must have shape {expected}, {rank} dimensions, got shape {tuple(shape)}")


def check_shape(name: str, shape: Sequence[int], wanted: Sequence[int], spelled: str) -> None:
    """The shape must be exactly `wanted`."""
    if len(shape) != len(wanted) or any(a != b for a, b in zip(shape, wanted, strict=True)):
        raise ValueError(f"{name} must have shape {spelled} = {tuple(wanted)}, got {tuple(shape)}")


def check_heads(heads_q: int, heads_kv: int) -> None:
    """Query heads share key/value heads in equal groups."""
    if heads_q == heads_kv:
        return
    if heads_kv == 0 or heads_q % heads_kv != 0:
        raise ValueError(
            f"the heads of q must be a multiple of the heads of k and v, got {heads_q} and {heads_kv} heads"
        )


def check_broadcast(name: str, shape: Sequence[int], target: tuple[int | None, ...]) -> None:
    """The shape must broadcast to (batch, heads_q, seqlen_q, seqlen_k); None stands for 'known only on the device'."""
    spelled = "(batch, heads_q, seqlen_q, seqlen_k)"
    sizes = tuple("longest" if size is None else size for size in target)
    fits = len(shape) <= 4 and all(
        want is None or size == 1 or size == want for size, want in zip(reversed(shape), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must be broadcastable to {spelled} = {sizes}, got shape {tuple(shape)}")


def _dense_sizes(m: Any) -> dict[str, int]:
    q, k, v = m.q, m.k, m.v
    check_rank("q", q.shape, "(batch, heads_q, seqlen_q, head_dim)")
    check_rank("k", k.shape, "(batch, heads_kv, seqlen_k, head_dim)")
    check_rank("v", v.shape, "(batch, heads_kv, seqlen_k, head_dim_v)")
    batch, heads_q, seqlen_q, head_dim = q.shape
    _, heads_kv, seqlen_k, _ = k.shape
    check_shape("k", k.shape, (batch, heads_kv, seqlen_k, head_dim), "(batch, heads_kv, seqlen_k, head_dim)")
    check_shape("v", v.shape[:3], (batch, heads_kv, seqlen_k), "(batch, heads_kv, seqlen_k, ...)")
    check_heads(heads_q, heads_kv)
    return {
        "batch": batch,
        "heads_q": heads_q,
        "heads_kv": heads_kv,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "head_dim": head_dim,
        "head_dim_v": v.shape[3],
    }


def _varlen_sizes(m: Any) -> dict[str, int]:
    q, k, v, cu_q, cu_k = m.q, m.k, m.v, m.cu_seqlens_q, m.cu_seqlens_k
    check_rank("q", q.shape, "(total_q, heads_q, head_dim)")
    check_rank("k", k.shape, "(total_k, heads_kv, head_dim)")
    check_rank("v", v.shape, "(total_k, heads_kv, head_dim_v)")
    total_q, heads_q, head_dim = q.shape
    total_k, heads_kv, _ = k.shape
    check_shape("k", k.shape, (total_k, heads_kv, head_dim), "(total_k, heads_kv, head_dim)")
    check_shape("v", v.shape[:2], (total_k, heads_kv), "(total_k, heads_kv, ...)")
    check_heads(heads_q, heads_kv)
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if len(cu.shape) != 1 or cu.shape[0] < 1:
            raise ValueError(f"{name} must have shape (batch + 1,), got {tuple(cu.shape)}")
    if cu_q.shape[0] != cu_k.shape[0]:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have the same length batch + 1, "
            f"got {cu_q.shape[0]} and {cu_k.shape[0]}"
        )
    return {
        "batch": cu_q.shape[0] - 1,
        "heads_q": heads_q,
        "heads_kv": heads_kv,
        "seqlen_q": total_q,
        "seqlen_k": total_k,
        "head_dim": head_dim,
        "head_dim_v": v.shape[2],
    }


def _cache_sizes(m: Any) -> dict[str, int]:
    q, k, v, k_new, v_new, table = m.q, m.k, m.v, m.k_new, m.v_new, m.block_table
    check_rank("q", q.shape, "(batch, heads_q, seqlen_q, head_dim)")
    batch, heads_q, seqlen_q, head_dim = q.shape
    first, slots = ("batch", "capacity") if table is None else ("num_pages", "page_size")
    check_rank("k_cache", k.shape, f"({first}, heads_kv, {slots}, head_dim)")
    check_rank("v_cache", v.shape, f"({first}, heads_kv, {slots}, head_dim_v)")
    blocks, heads_kv, capacity, _ = k.shape
    if table is None:
        blocks = batch
    else:
        check_rank("block_table", table.shape, "(batch, max_pages)")
        check_shape("block_table", table.shape, (batch, table.shape[1]), "(batch, max_pages)")
        if capacity < 1:
            raise ValueError(f"k_cache must have a page_size of at least 1, got shape {tuple(k.shape)}")
    wanted = (blocks, heads_kv, capacity, head_dim)
    check_shape("k_cache", k.shape, wanted, f"({first}, heads_kv, {slots}, head_dim)")
    check_shape("v_cache", v.shape[:3], wanted[:3], f"({first}, heads_kv, {slots}, ...)")
    check_heads(heads_q, heads_kv)
    head_dim_v = v.shape[3]
    if (k_new is None) != (v_new is None):
        given, missing = ("k_new", "v_new") if v_new is None else ("v_new", "k_new")
        raise ValueError(f"k_new and v_new go together, got {given} without {missing}")
    if k_new is not None and v_new is not None:
        check_rank("k_new", k_new.shape, "(batch, heads_kv, seqlen_new, head_dim)")
        new = k_new.shape[2]
        check_shape("k_new", k_new.shape, (batch, heads_kv, new, head_dim), "(batch, heads_kv, seqlen_new, head_dim)")
        check_shape(
            "v_new", v_new.shape, (batch, heads_kv, new, head_dim_v), "(batch, heads_kv, seqlen_new, head_dim_v)"
        )
    if m.cos is not None:
        check_rotary(m.cos.shape, m.sin.shape, head_dim)
    return {
        "batch": batch,
        "heads_q": heads_q,
        "heads_kv": heads_kv,
        "seqlen_q": seqlen_q,
        "seqlen_k": capacity if table is None else table.shape[1] * capacity,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
    }


_SIZES: dict[str, Any] = {"dense": _dense_sizes, "varlen": _varlen_sizes, "cache": _cache_sizes}


def check_rotary(cos: Sequence[int], sin: Sequence[int], head_dim: int) -> None:
    """The shapes of the tables must be (max_positions, rotary_dim // 2), rotary_dim at most the head dimension."""
    check_rank("rotary.cos", cos, "(max_positions, rotary_dim // 2)")
    check_shape("rotary.sin", sin, cos, "rotary.cos's shape")
    if 2 * cos[1] > head_dim:
        raise ValueError(f"rotary.cos has {cos[1]} columns, but head_dim {head_dim} allows at most {head_dim // 2}")


# --------------------------------------------------------------------------------------------------------- options


def check_option_types(options: Options) -> None:
    """Refuses options of the wrong type; a bool is no number here."""
    if not isinstance(options.causal, bool):
        raise TypeError(f"causal must be a bool, got {type(options.causal).__name__} {options.causal!r}")
    if not isinstance(options.causal_alignment, str):
        raise TypeError(f"causal_alignment must be one of {ALIGNMENTS}, got {options.causal_alignment!r}")
    for side in (options.window_left, options.window_right):
        if side is not None and not _is_number(side, (int, torch.SymInt)):
            raise TypeError(f"window must hold integers or None, got {type(side).__name__} {side!r}")
    for name, value in (("softcap", options.softcap), ("scale", options.scale), ("dropout_p", options.dropout_p)):
        optional = name != "dropout_p"
        if not (value is None and optional) and not _is_number(value, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")


def _is_number(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def check_options(options: Options) -> None:
    """Refuses options outside their range."""
    for name in ("window_left", "window_right"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise ValueError(f"window must hold integers >= 0 or None (= open), got {name} = {value}")
    if options.causal_alignment not in ALIGNMENTS:
        raise ValueError(f"causal_alignment must be one of {ALIGNMENTS}, got {options.causal_alignment!r}")
    for name in ("softcap", "scale", "dropout_p"):
        value = getattr(options, name)
        # The bound keeps products with it inside float32's range; the comparison is False for NaN.
        if isinstance(value, (int, float)) and not abs(value) <= 1e30:
            raise ValueError(f"{name} must be finite, and at most 1e30 in size, got {value}")
    if options.softcap is not None and options.softcap <= 0:
        raise ValueError(f"softcap must be positive, or None to switch it off, got {options.softcap}")
    if not 0 <= options.dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {options.dropout_p}")


def check_keywords(function: str, given: Iterable[str]) -> None:
    """Refuses keyword arguments that `AttentionOptions` does not list."""
    unknown = set(given) - AttentionOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"{function} got an unexpected keyword argument {min(unknown)!r}")


def split_window(window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """(left, right) of a `window` argument."""
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right) of integers or None, got {window!r}")
    return window[0], window[1]


# ---------------------------------------------------------------------------------------------------------- values


def check_values(problem: Problem, inputs: Inputs) -> None:
    """Checks the seed, and what is inside the index tensors where reading them costs nothing: on the CPU.

    On other devices a look would stall the stream and break graph capture.
    """
    if inputs.seed is not None and not torch.compiler.is_compiling() and int(inputs.seed) < 0:
        raise ValueError(f"seed must be in [0, 2**63), got {int(inputs.seed)}")
    if problem.device.type != "cpu":
        return
    if problem.kind == "varlen":
        _check_cu_seqlens(problem, inputs)
    elif problem.kind == "cache":
        _check_cache(problem, inputs)
    elif inputs.kv_lengths is not None:
        _check_lengths("kv_lengths", inputs.kv_lengths.tolist(), [problem.seqlen_k] * problem.batch, "seqlen_k")


def check_results(problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor, residual: Tensor | None) -> None:
    """The results of a forward pass as its backward gets them back: hooks on saved tensors may have changed them."""
    rows = (problem.heads_q, problem.seqlen_q)
    lse_shape = rows if problem.kind == "varlen" else (problem.batch, *rows)
    wanted: dict[str, tuple[Tensor | None, Any, torch.dtype]] = {
        "out": (out, (*inputs.q.shape[:-1], problem.head_dim_v), problem.dtype),
        "lse": (lse, lse_shape, problem.accumulator),
    }
    wanted["residual"] = (residual, *wanted["out" if problem.dtype != problem.accumulator else "lse"][1:])
    for name, (x, shape, dtype) in wanted.items():
        if x is None:
            continue
        if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != problem.device:
            raise ValueError(
                f"{name} of the forward pass must come back with shape {tuple(shape)}, dtype {dtype}, on "
                f"{problem.device}, got shape {tuple(x.shape)}, dtype {x.dtype}, on {x.device}: does a hook on saved "
                "tensors change it?"
            )


def _check_lengths(name: str, lengths: list[int], limits: list[int], spelled: str) -> None:
    for b, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
        if not 0 <= length <= limit:
            raise ValueError(f"{name} must be between 0 and {spelled} = {limit}, got {name}[{b}] = {length}")


def _check_cu_seqlens(problem: Problem, inputs: Inputs) -> None:
    longest = []
    for name, cu, total in (
        ("cu_seqlens_q", inputs.cu_seqlens_q, problem.seqlen_q),
        ("cu_seqlens_k", inputs.cu_seqlens_k, problem.seqlen_k),
    ):
        assert cu is not None
        ends = cu.tolist()
        if ends[0] != 0:
            raise ValueError(f"{name} must begin with 0, got {ends[0]}")
        lengths = [end - start for start, end in pairwise(ends)]
        for b, length in enumerate(lengths):
            if length < 0:
                raise ValueError(f"{name} must not decrease, got {ends[b]} followed by {ends[b + 1]} at index {b + 1}")
        if ends[-1] > total:
            raise ValueError(f"{name} must end within the {total} tokens given, got {ends[-1]}")
        longest.append(max(lengths, default=0))
    if inputs.kv_lengths is not None:
        _check_lengths("kv_lengths", inputs.kv_lengths.tolist(), lengths, "the sequence's keys")
    for name, tensor in (("mask", inputs.mask), ("bias", inputs.bias)):
        if tensor is not None:
            shape = (1, 1, *tensor.shape)
            if any(size not in (1, need) and size < need for size, need in zip(shape[-2:], longest, strict=True)):
                raise ValueError(
                    f"{name} must be broadcastable to (batch, heads_q, {longest[0]}, {longest[1]}), the longest "
                    f"sequences of q and k, got shape {tuple(tensor.shape)}"
                )


def _check_cache(problem: Problem, inputs: Inputs) -> None:
    assert inputs.kv_lengths is not None
    lengths = inputs.kv_lengths.tolist()
    room = problem.seqlen_k - problem.seqlen_new
    _check_lengths("cache_lengths", lengths, [room] * problem.batch, "the capacity less the new keys")
    totals = [length + problem.seqlen_new for length in lengths]
    if inputs.cos is not None and lengths:
        needed = max(*totals, min(problem.seqlen_q, 1) if problem.bottom_right else problem.seqlen_q)
        if needed > inputs.cos.shape[0]:
            raise ValueError(
                f"rotary.cos must hold a row for each of {needed} positions, got {inputs.cos.shape[0]} rows"
            )
    if inputs.block_table is not None:
        pages = inputs.k.shape[0]
        for b, (row, total) in enumerate(zip(inputs.block_table.tolist(), totals, strict=True)):
            for slot, page in enumerate(row[: -(-total // problem.page_size)]):
                if not 0 <= page < pages:
                    raise ValueError(
                        f"block_table must name pages between 0 and {pages - 1}, got block_table[{b}, {slot}] = {page}"
                    )
