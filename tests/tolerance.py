"""When a result is right.

Against a float64 evaluation of the same rounded inputs the error may be at most twice that of plain PyTorch eager
attention in the same dtype, plus a floor. NaN and infinities must be where the exact result has them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Times the largest magnitude of the exact result.
FLOOR = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def to_numpy(x: Tensor) -> np.ndarray:
    """Any tensor as float64, exactly."""
    return x.detach().cpu().to(torch.float64).numpy()


def assert_close(
    name: str,
    actual: Tensor,
    exact: np.ndarray,
    eager: Tensor | None,
    dtype: torch.dtype,
    *,
    largest_term: float = 0.0,
) -> None:
    """Fails unless `actual` is as near to `exact` as the rule demands.

    eager: the yardstick; None allows the floor alone. largest_term: the largest product that was summed into the
    result; it takes the place of the result's magnitude where the sum cancels to zero in float64 too, as the gradient
    of q does when there is but one key.
    """
    assert tuple(actual.shape) == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {exact.shape}"
    found = to_numpy(actual)
    for kind, test in (("NaN", np.isnan), ("inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = np.argwhere(test(found) != test(exact))
        assert wrong.size == 0, f"{name}: {kind} in the wrong places, first at {tuple(wrong[0])}"
    finite = np.isfinite(exact)
    magnitude = np.max(np.abs(exact[finite]), initial=0.0)
    if magnitude < 1e-12 * largest_term:
        magnitude = largest_term
    limit = FLOOR[dtype] * magnitude
    if eager is not None:
        reference = to_numpy(eager)
        both = finite & np.isfinite(reference)
        limit += 2.0 * np.max(np.abs(reference[both] - exact[both]), initial=0.0)
    error = np.zeros_like(exact)
    error[finite] = np.abs(found[finite] - exact[finite])
    worst = np.max(error, initial=0.0)
    if worst > limit:
        where = np.unravel_index(np.argmax(error), error.shape)
        raise AssertionError(
            f"{name}: error {worst:.3e} exceeds {limit:.3e} ({dtype}), at {tuple(map(int, where))}: "
            f"got {found[where]:.9g}, expected {exact[where]:.9g}"
        )
