"""Arguments in flash-attn's terms: checked under their own names, and in fastattn's terms."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...autograd import is_plain
from ...problem import check_heads, check_shape


def check_tensors(**tensors: Any) -> None:
    """Each must be a tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def check_rank(name: str, x: Tensor, spelled: str) -> None:
    """`spelled` is the shape in words."""
    if x.ndim != spelled.count(",") + 1:
        raise ValueError(f"{name} must have shape {spelled}, got {tuple(x.shape)}")


def check_packed(name: str, x: Tensor, spelled: str, dim: int, parts: int) -> None:
    """Dimension `dim` holds so many tensors."""
    check_tensors(**{name: x})
    check_rank(name, x, spelled)
    if x.shape[dim] != parts:
        raise ValueError(f"{name} must have shape {spelled}, got {tuple(x.shape)}")


def check_dense(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (batch_size, seqlen_q, nheads, headdim), k and v (batch_size, seqlen_k, nheads_k, headdim)."""
    check_tensors(q=q, k=k, v=v)
    check_rank("q", q, "(batch_size, seqlen_q, nheads, headdim)")
    spelled = "(batch_size, seqlen_k, nheads_k, headdim)"
    check_rank("k", k, spelled)
    check_rank("v", v, spelled)
    check_shape("k", k.shape, (q.shape[0], *k.shape[1:3], q.shape[3]), spelled)
    check_shape("v", v.shape[:3], k.shape[:3], "(batch_size, seqlen_k, nheads_k, ...)")
    check_heads(q.shape[2], k.shape[2])


def check_varlen(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (total_q, nheads, headdim), k and v (total_k, nheads_k, headdim)."""
    check_tensors(q=q, k=k, v=v)
    check_rank("q", q, "(total_q, nheads, headdim)")
    check_rank("k", k, "(total_k, nheads_k, headdim)")
    check_rank("v", v, "(total_k, nheads_k, headdim)")
    check_shape("k", k.shape, (*k.shape[:2], q.shape[2]), "(total_k, nheads_k, headdim)")
    check_shape("v", v.shape[:2], k.shape[:2], "(total_k, nheads_k, ...)")
    check_heads(q.shape[1], k.shape[1])


def check_values(name: str, x: Tensor, most: int, spelled: str) -> None:
    """Integers from 0 to `most`, where a look costs nothing: on the CPU, with nothing looking on."""
    if x.device.type != "cpu" or not is_plain(x) or x.numel() == 0:
        return
    least, largest = (int(end) for end in x.aminmax())
    if least < 0 or largest > most:
        raise ValueError(f"{name} must be between 0 and {spelled} = {most}, got {least if least < 0 else largest}")


def check_like(q: Tensor, **tensors: Tensor) -> None:
    """Each must have q's dtype and be where q is."""
    for name, x in tensors.items():
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, but q has {q.dtype}: they must be the same")
        if x.device != q.device:
            raise ValueError(f"{name} is on device {x.device}, but q is on {q.device}")


def check_tables(headdim: int, **tables: Any) -> None:
    """The tables of cosines and sines, in this order: (seqlen_rotary, rotary_dim / 2), rotary_dim at most headdim."""
    check_tensors(**tables)
    for name, x in tables.items():
        check_rank(name, x, "(seqlen_rotary, rotary_dim / 2)")
        if 2 * x.shape[1] > headdim:
            raise ValueError(f"{name} has {x.shape[1]} columns, but headdim {headdim} allows at most {headdim // 2}")
    (cos_name, cos), (sin_name, sin) = tables.items()
    check_shape(sin_name, sin.shape, cos.shape, f"that of {cos_name}")


def options(
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """The keyword arguments of fastattn's functions."""
    softcap = number("softcap", softcap)
    return {
        "scale": None if softmax_scale is None else number("softmax_scale", softmax_scale),
        "causal": _flag("causal", causal),
        "window": window(window_size),
        "softcap": softcap if softcap > 0 else None,
        "alibi_slopes": alibi_slopes,
    }


# flash-attn hands numbers to C++, which takes whatever converts: those of NumPy, and tensors of one element.


def window(window_size: Sequence[int] | Tensor) -> tuple[int | None, int | None] | None:
    """A negative side of flash-attn's window_size, any pair of integers, is open."""
    try:
        left, right = map(_integer, window_size)
    except (TypeError, ValueError):
        raise TypeError(
            f"window_size must be a pair (left, right) of integers, -1 for an open side, got {window_size!r}"
        ) from None
    if left < 0 and right < 0:
        return None
    return None if left < 0 else left, None if right < 0 else right


def _integer(value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)


def number(name: str, value: Any) -> Any:
    """A float, or what stands for one in a traced program."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool):
        return value
    if isinstance(value, Tensor):
        fits = value.numel() == 1 and not value.requires_grad
    else:
        fits = hasattr(type(value), "__float__") and not isinstance(value, bool)
    if not fits:
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    fits = hasattr(type(value), "__bool__") and not (isinstance(value, Tensor) and value.numel() != 1)
    if not fits or value not in (0, 1):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__} {value!r}")
    return bool(value)


def flash_lse(lse: Tensor) -> Tensor:
    """lse as flash-attn gives it: +inf for a query that sees no key, where fastattn says -inf."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)
