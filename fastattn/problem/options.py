"""The options of a call: types and ranges."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .arguments import OPTIONS
from .types import ALIGNMENTS, AttentionOptions, Inputs, Options
from .values import LARGEST_OFFSET, OFFSETS


def check_option_types(options: Options) -> None:
    """Refuses options of the wrong type; a bool is no number here."""
    if not isinstance(options.causal, bool):
        raise TypeError(f"causal must be a bool, got {type(options.causal).__name__} {options.causal!r}")
    if not isinstance(options.causal_alignment, str):
        raise TypeError(f"causal_alignment must be one of {ALIGNMENTS}, got {options.causal_alignment!r}")
    for side in (options.window_left, options.window_right):
        if side is not None and not _is_number(side, (int, torch.SymInt)):
            raise TypeError(f"window must hold integers or None, got {type(side).__name__} {side!r}")
    for name, value, optional in _numbers(options):
        if not (value is None and optional) and not _is_number(value, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")


def _numbers(options: Options) -> list[tuple[str, Any, bool]]:
    """(name, value, whether it may be None) of each number."""
    return [
        (x.name, value, x.type == "float?")
        for x, value in zip(OPTIONS, options, strict=True)
        if x.type in ("float", "float?")
    ]


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
    for name, value, _ in _numbers(options):
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


def with_offset(inputs: Inputs, q_offset: int | Tensor | None) -> Inputs:
    """The tensors of a call with its argument `q_offset`, a number as (batch,) int32."""
    if q_offset is None:
        return inputs
    if isinstance(q_offset, Tensor):
        return inputs._replace(q_offset=q_offset)
    if not _is_number(q_offset, (int, torch.SymInt)):
        raise TypeError(f"q_offset must be an int or an int32 tensor, got {type(q_offset).__name__} {q_offset!r}")
    if abs(q_offset) > LARGEST_OFFSET:
        raise ValueError(f"q_offset must be {OFFSETS}, got {q_offset}")
    ends = inputs.cu_seqlens_q
    sized = inputs.q if ends is None else ends
    if not (isinstance(inputs.q, Tensor) and isinstance(sized, Tensor)) or sized.ndim == 0:
        return inputs  # the call will be refused
    batch = sized.shape[0] if ends is None else max(sized.shape[0] - 1, 0)
    return inputs._replace(q_offset=inputs.q.new_full((batch,), q_offset, dtype=torch.int32))


def split_window(window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """(left, right) of a `window` argument."""
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right) of integers or None, got {window!r}")
    return window[0], window[1]
