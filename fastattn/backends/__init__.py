"""The backends: what computes an attention call.

base.py has the interface and its defaults, dispatch.py the list of backends and the choice among them.
"""

from .base import (
    Backend,
    Grads,
    Needs,
    Prepared,
    Results,
    empty_grad,
    empty_lse,
    empty_out,
    empty_results,
)

__all__ = [
    "Backend",
    "Grads",
    "Needs",
    "Prepared",
    "Results",
    "empty_grad",
    "empty_lse",
    "empty_out",
    "empty_results",
]
