"""Autograd: the functions that record a call, the operators behind them, and what transforms do to both."""

from .functions import attend, attend_cache, is_batched, is_plain, new_seed

__all__ = ["attend", "attend_cache", "is_batched", "is_plain", "new_seed"]
