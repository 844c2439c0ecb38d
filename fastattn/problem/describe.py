"""From the tensors and options of a call to its `Problem`: every check that the values of tensors do not matter to."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .alignment import why_not_aligned
from .arguments import CACHE_NAMES, TENSORS
from .options import check_option_types, check_options
from .shapes import SIZES, check_alternatives
from .types import DTYPES, Inputs, Meta, Options, Problem

Metas = tuple[Meta | None, ...]


def metas_of(kind: str, inputs: Inputs) -> Metas:
    """What `describe` needs to know of the tensors. Raises TypeError if one is no dense tensor."""
    check_tensors(kind, inputs)
    return tuple([None if t is None else Meta(t.shape, t.dtype, t.device) for t in inputs])


def describe(
    kind: str, inputs: Inputs, options: Options, *, cached: bool = True, metas: Metas | None = None
) -> Problem:
    """Checks types, devices, dtypes, shapes and options, in this order, and describes the call.

    `cached` must be False when sizes may be symbolic (under tracing), as those cannot be dictionary keys. metas: what
    `metas_of` gives, if it is known.
    Raises TypeError or ValueError naming the argument, what came and what was expected.
    """
    if metas is None:
        metas = metas_of(kind, inputs)
    # Not part of the cached description, whose key cannot tell 1 from 1.0 or True and must be hashable.
    check_option_types(options)
    if not cached:
        return _describe(kind, metas, options)
    # A cache is too large to be copied: which backend can use it depends on how it lies in memory.
    unaligned = kind == "cache" and any(map(why_not_aligned, (inputs.k, inputs.v)))
    return _describe_cached(kind, metas, options, unaligned)


def check_tensors(kind: str, inputs: Inputs) -> None:
    """Every tensor argument must be a dense tensor; those that the call can do without may be None."""
    for argument, x in zip(TENSORS, inputs, strict=True):
        if x is None and kind not in argument.required:
            continue
        name = CACHE_NAMES.get(argument.name, argument.name) if kind == "cache" else argument.name
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested:
            kind_of = "a nested tensor" if x.is_nested else f"layout {x.layout}"
            raise TypeError(f"{name} must be a dense (strided) tensor, got {kind_of}")


def _describe(kind: str, metas: Metas, options: Options, unaligned: bool = False) -> Problem:
    names = CACHE_NAMES if kind == "cache" else {}
    check_devices(metas, names)
    check_dtypes(metas, names)
    m: Any = Inputs(*metas)  # type: ignore[arg-type]  # the same fields, holding shapes instead of tensors
    sizes = SIZES[kind](m)
    for argument, meta in zip(TENSORS, metas, strict=True):
        if meta is not None and argument.shapes:
            check_alternatives(kind, names.get(argument.name, argument.name), meta.shape, argument.shapes, sizes)
    check_options(options)

    scale = options.scale
    if scale is None:
        scale = 1.0 / math.sqrt(sizes["head_dim"]) if sizes["head_dim"] > 0 else 1.0
    window_left, window_right = _reach(options.window_left), _reach(options.window_right)
    used = {
        **{argument.feature: meta for argument, meta in zip(TENSORS, metas, strict=True) if argument.feature},
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


def check_devices(metas: Metas, names: dict[str, str]) -> None:
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
_ACCEPTED: dict[str, tuple[tuple[torch.dtype, ...], str]] = {
    "float": (DTYPES, f"of floating point, {_ONE_OF}"),
    "bool": ((torch.bool,), "torch.bool (True = attend); a float mask is passed as bias"),
    "int32": ((torch.int32,), "torch.int32"),
    "int64": ((torch.int64,), "torch.int64"),
}
"""By the dtype of a `TensorArgument`: what it may be, and how messages say that."""


def check_dtypes(metas: Metas, names: dict[str, str]) -> None:
    """q decides the dtype of k, v and the new keys; index tensors are int32."""
    dtype = metas[0].dtype  # type: ignore[union-attr]
    if dtype not in DTYPES:
        raise TypeError(f"q must have dtype {_ONE_OF}, got {dtype}")
    for argument, meta in zip(TENSORS, metas, strict=True):
        if meta is None:
            continue
        name = names.get(argument.name, argument.name)
        if argument.dtype in _ACCEPTED:
            accepted, expected = _ACCEPTED[argument.dtype]
            if meta.dtype not in accepted:
                raise TypeError(f"{name} must have dtype {expected}, got {meta.dtype}")
        elif meta.dtype != dtype:
            raise TypeError(f"{name} has dtype {meta.dtype}, but q has {dtype}: they must be the same")
