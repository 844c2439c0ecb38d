"""What the modules check of their arguments; each check raises a sentence that names the argument."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """An integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_divides(name: str, value: int, parts_name: str, parts: int) -> None:
    """`value` must fall into `parts` equal parts."""
    if value % parts != 0:
        raise ValueError(f"{name} must be divisible by {parts_name}, got {value} and {parts}")


def check_number(name: str, value: Any) -> None:
    """A finite number, and not a bool in disguise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_probability(name: str, value: Any) -> None:
    """A number in [0, 1]."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """Of the weights that multiply x, unless torch.autocast gives both the same."""
    if x.dtype == weight.dtype:
        return
    device = x.device.type
    casts = device != "meta" and torch.is_autocast_enabled(device)
    if not casts or not x.is_floating_point() or torch.float64 in (x.dtype, weight.dtype):
        raise TypeError(
            f"{name} has dtype {x.dtype}, but the weights have {weight.dtype}: they must be the same, or of floating "
            "dtypes other than float64 under torch.autocast"
        )


def check_token_ids(name: str, ids: Any, vocab_size: int) -> None:
    """Integers of shape (batch, seqlen), each a row of the vocabulary.

    The values are looked at on the CPU only: elsewhere a look would stall the device, and a tracer has none.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of token ids, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must have dtype torch.int64 or torch.int32, got {ids.dtype}")
    if ids.ndim != 2:
        raise ValueError(f"{name} must have shape (batch, seqlen), got {tuple(ids.shape)}")
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel() > 0:
        low, high = (int(x) for x in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} must hold token ids from 0 to {vocab_size - 1}, got {wrong}")


def check_token_mask(name: str, mask: Any, shape: tuple[int, ...]) -> None:
    """An attention mask (True or 1 = real token) of that shape, or None."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and mask.dtype not in _INTEGERS:
        raise TypeError(f"{name} must have dtype torch.bool or an integer one (1 = real token), got {mask.dtype}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must have shape (batch, seqlen) = {shape}, got {tuple(mask.shape)}")


def as_bool(mask: Tensor | None) -> Tensor | None:
    """The mask that `check_token_mask` checks, as bool; None as None."""
    return None if mask is None else mask.to(torch.bool)
