"""When `validate` and the benchmarks call a result right.

Against a float64 evaluation of the same (rounded) inputs, the truth, the largest error of a result is at most twice
the error of plain eager attention in the call's dtype, plus a floor in proportion to the largest value of the truth.
NaN and infinities stand in the same places.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOORS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Times the largest finite magnitude of the truth."""


def bound(truth: Tensor, eager_error: float, dtype: torch.dtype) -> float:
    """How far a result of a call in this dtype may be from the truth."""
    return 2.0 * eager_error + FLOORS[dtype] * _largest(torch.where(truth.isfinite(), truth, 0.0))


def eager_error(eager: Tensor, truth: Tensor) -> float:
    """The yardstick: eager's largest error.

    Where eager alone is NaN, as in a row that sees no key, it says nothing about rounding and does not count.
    """
    eager = eager.detach().double()
    return _largest(torch.where(truth.isfinite() & eager.isfinite(), eager - truth, 0.0))


def max_error(result: Tensor, truth: Tensor) -> float:
    """The largest absolute error; infinite where NaN and infinities do not agree."""
    if bool(misplaced(result, truth).any()):
        return float("inf")
    return _largest(torch.where(truth.isfinite(), result.detach().double() - truth, 0.0))


def misplaced(result: Tensor, truth: Tensor) -> Tensor:
    """True for the elements where one of the two is NaN or an infinity and the other is not the same."""
    return (result.isnan() != truth.isnan()) | ((result.isinf() | truth.isinf()) & (result != truth))


def _largest(x: Tensor) -> float:
    return x.detach().abs().max().item() if x.numel() else 0.0
