"""torch's checkpoints, which compute a forward again with the switch as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint

from .switch import is_active, use


def _under(on: bool, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the switch at `on`, whenever and in whichever thread it runs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with use(on):
            return function(*args, **kwargs)

    return run


def bind_checkpoints() -> None:
    """Has torch's checkpoints keep the switch beside the other state under which a forward is computed again.

    They keep the random state, autocast and the default device, but no function modes. The backward pass cannot tell:
    it may begin after the block, on another thread, or without passing a function that a mode sees. It is the classes
    that change, as libraries have imported the functions by name. Without the second, which is private to torch,
    checkpoints follow the switch at the call of backward.
    """
    reentrant = torch.utils.checkpoint.CheckpointFunction
    forward: Any = reentrant.forward

    @functools.wraps(forward)
    def bound_forward(ctx: Any, run_function: Any, *args: Any) -> Any:
        return forward(ctx, _under(is_active(), run_function), *args)

    reentrant.forward = staticmethod(bound_forward)  # type: ignore[method-assign]
    frame: Any = getattr(torch.utils.checkpoint, "_CheckpointFrame", None)
    if frame is None:
        return
    init = frame.__init__

    @functools.wraps(init)
    def bound_init(self: Any, recompute_fn: Any, *args: Any, **kwargs: Any) -> None:
        init(self, _under(is_active(), recompute_fn), *args, **kwargs)

    frame.__init__ = bound_init
