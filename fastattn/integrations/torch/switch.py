"""The switch `use`, and the function mode behind it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext

from ...functional import attention
from .decision import OWN_TYPES, understand, why_torch
from .policies import translate_policies

_torch_sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention
_torch_multi_head: Callable[..., Any] = F.multi_head_attention_forward
_QUESTIONS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


class use:  # named as what it does, like torch.no_grad
    """Runs scaled_dot_product_attention on fastattn wherever it means the same: from here on, or in a with block.

        use()              from here on, in this thread
        use(False)         torch's own function again
        with use(): ...    in the block; what was before is restored, whatever happens in it

    Calls reach fastattn from anywhere in Python: torch.nn.functional, names imported from it earlier,
    nn.MultiheadAttention and the nn.Transformer family (whose native fast path is left meanwhile), libraries. Results
    and gradients are torch's up to rounding; the memory order of the output is the query's. Dropout keeps other
    entries than torch would: the mask is fastattn's, from one number of torch's default CPU generator per call, so
    torch.manual_seed reproduces it. What fastattn does not take runs on torch, see `explain`; so do calls that never
    pass through Python: TorchScript, and the native fast path elsewhere.

    Like torch.no_grad it counts for the thread that calls it. torch.utils.checkpoint computes a forward again as it was
    computed first, wherever the backward pass stands. An autograd function of your own that computes a forward in its
    backward pass follows the switch at the call of backward. torch.compile follows it, around calls of compiled
    functions and inside them, except inside a checkpoint that is called in a compiled function: torch runs that. Every
    call of one of torch's functions from Python takes a little longer meanwhile.
    torch.nn.attention.sdpa_kernel chooses between torch's own kernels, for the calls that torch gets.
    Raises TypeError if enabled is no bool.
    """

    def __init__(self, enabled: bool = True) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(f"enabled must be a bool, got {type(enabled).__name__} {enabled!r}")
        self._enabled, self._left = enabled, False
        self._before = _switch(enabled)

    def __enter__(self) -> use:
        before = _switch(self._enabled)
        if self._left:  # a second block
            self._before, self._left = before, False
        return self

    def __exit__(self, *_: object) -> None:
        _switch(self._before)
        self._left = True


def _attend(*args: Any, **kwargs: Any) -> Tensor:
    """torch's function, on fastattn where that is right."""
    call = understand(*args, **kwargs)
    if isinstance(call, str) or why_torch(call) is not None:
        return _torch_sdpa(*args, **kwargs)
    q, k, v, options, *_ = call.translated
    translate_policies()
    return call.translated.finish(attention(q, k, v, **options))


# As torch's own, they are one node of a graph to torch.compile, looked into only after that.
_attend_in_graph = torch.compiler.allow_in_graph(_attend)


def _multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
    return _with_mode(_torch_multi_head, *args, **kwargs)


_multi_head_in_graph = torch.compiler.allow_in_graph(_multi_head_attention_forward)

# They may run forward passes, in autograd functions that compute theirs again. Some are torch functions in later
# versions of torch alone.
_BACKWARD_PASSES = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


class _Mode(TorchFunctionMode):
    """Sees the calls of torch's functions while it is on the stack of this thread; is off while it handles one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _torch_sdpa:
            return _attend_in_graph(*args, **kwargs)
        if any(kind not in OWN_TYPES for kind in types):  # a subclass of Tensor has its say first
            return func(*args, **kwargs)
        if func is _torch_multi_head:
            return _multi_head_in_graph(*args, **kwargs)
        if func in _BACKWARD_PASSES:
            return _with_mode(func, *args, **kwargs)
        return func(*args, **kwargs)


_mode = _Mode()


def _with_mode(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The body of one of torch's Python functions, with the mode on.

    Such a function begins with a question whether somebody overrides it, which the mode would affirm for ever. What
    others wrapped around it has run already when torch asks. A replacement that hides torch's function runs without
    the mode.
    """
    asking = inspect.unwrap(function)
    code = getattr(asking, "__code__", None)
    if code is None or not set(_QUESTIONS) & set(code.co_names):
        return function(*args, **kwargs)
    names = {**asking.__globals__, **dict.fromkeys(_QUESTIONS, lambda *_: False)}
    body = types.FunctionType(code, names, asking.__name__, asking.__defaults__, asking.__closure__)
    body.__kwdefaults__ = asking.__kwdefaults__
    with use():
        return body(*args, **kwargs)


def _stack() -> list[Any]:
    return _get_current_function_mode_stack()


def is_active() -> bool:
    """Whether the switch is on in this thread."""
    return _mode in _stack()


def _switch(on: bool) -> bool:
    """Puts the mode on the stack of this thread, or takes it off; returns whether it was there.

    It lies at the bottom, so that modes that come and go meanwhile find themselves on top as they left. Only the
    device of torch.set_default_device must lie below, and that alone: `with torch.device(...)` pushes and pops the
    same kind of mode at the top, without entering it.
    """
    before = _stack()
    if (_mode in before) == on:
        return on
    after = [mode for mode in before if mode is not _mode]
    if on:
        default_device = bool(after) and isinstance(after[0], DeviceContext) and hasattr(after[0], "old_device")
        after.insert(1 if default_device else 0, _mode)
    for _ in before:
        _pop_mode()
    for mode in after:
        _push_mode(mode)
    return not on
