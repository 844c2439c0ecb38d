"""The backends: what computes an attention call.

base.py has the interface and its defaults, dispatch.py the list of backends and the choice among them.
"""

from .base import Backend, Grads, Needs, Preference, Prepared, Results, empty_grad, empty_results

__all__ = ["Backend", "Grads", "Needs", "Preference", "Prepared", "Results", "empty_grad", "empty_results"]
