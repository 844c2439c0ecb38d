"""Arguments in flash-attn's terms: checked under their own names, and in fastattn's terms."""

from __future__ import annotations

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


def options(
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """The keyword arguments of fastattn's functions."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__} {causal!r}")
    if softmax_scale is not None:
        _check_number("softmax_scale", softmax_scale)
    _check_number("softcap", softcap)
    return {
        "scale": softmax_scale,
        "causal": causal,
        "window": window(window_size),
        "softcap": softcap if softcap > 0 else None,
        "alibi_slopes": alibi_slopes,
    }


def window(window_size: Sequence[int]) -> tuple[int | None, int | None] | None:
    """A negative side of flash-attn's window_size is open."""
    pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not pair or not all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in window_size):
        raise TypeError(
            f"window_size must be a pair (left, right) of integers, -1 for an open side, got {window_size!r}"
        )
    left, right = (None if n < 0 else n for n in window_size)
    return None if left is None and right is None else (left, right)


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")


def flash_lse(lse: Tensor) -> Tensor:
    """lse as flash-attn gives it: +inf for a query that sees no key, where fastattn says -inf."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)
