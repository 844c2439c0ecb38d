"""torch.nn.functional.scaled_dot_product_attention on fastattn, for code that calls torch's function.

    with fastattn.integrations.torch.use():
        model(x)

A torch function mode sees every call of torch's function from Python, whoever imported it and when, and while it is
active torch's modules leave their native fast path. torch's own function runs what fastattn should not.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext

from .. import ops, sdpa
from ..autograd import is_plain
from ..backends.dispatch import Report, choose, choose_cached, explain_choice
from ..casting import autocast
from ..functional import attention
from ..problem import Inputs, Options, Problem, describe

__all__ = ["Explanation", "explain", "use"]

_torch_sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention
_torch_multi_head: Callable[..., Any] = F.multi_head_attention_forward
_QUESTIONS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_OWN_TYPES = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)  # the last two are tracers' stand-ins


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


@dataclass(frozen=True)
class Explanation:
    """Where a call of scaled_dot_product_attention runs under `use`. str() of it is meant for people.

    runs_on: "fastattn" or "torch". reason: why torch; None for fastattn. report: fastattn's own choice of a backend,
    as of `fastattn.explain`; None where it did not come to that. active: whether `use` is on in this thread.
    """

    runs_on: str
    reason: str | None
    report: Report | None
    active: bool

    def __str__(self) -> str:
        when = "runs" if self.active else "would run"
        lines = [f"This call of scaled_dot_product_attention {when} on {self.runs_on}."]
        if not self.active:
            lines.append("  note: fastattn.integrations.torch.use() is not active in this thread, so torch runs it.")
        if self.reason is not None:
            lines.append(f"  not fastattn: {self.reason}")
        return "\n".join(lines + ([] if self.report is None else [str(self.report)]))


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Explanation:
    """Where this call of scaled_dot_product_attention runs under `use`, and why.

    Takes the arguments of torch's function; computes nothing. print() the result.
    """
    call = _understand(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if isinstance(call, str):
        return Explanation("torch", call, None, _mode in _stack())
    reason = _why_torch(call)
    report = explain_choice(call.problem, call.inputs, None)
    return Explanation("fastattn" if reason is None else "torch", reason, report, _mode in _stack())


# ------------------------------------------------------------------------------------------------------ the decision


@dataclass(frozen=True)
class _Call:
    """A call in fastattn's terms."""

    translated: sdpa.SdpaCall
    problem: Problem
    inputs: Inputs


def _understand(*args: Any, **kwargs: Any) -> _Call | str:
    """The call in fastattn's terms, or a sentence that says why it has to be torch's."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) and type(x) not in _OWN_TYPES:
            return f"one of its tensors is a {type(x).__name__}, which has a way of its own with torch's functions."
    if forward_ad._current_level >= 0:
        return "derivatives in forward mode are recorded, for which fastattn has no formula."
    try:
        call = _translate(*args, **kwargs)
        o = call.options
        inputs = Inputs(call.q, call.k, call.v, o["mask"], o["bias"])
        options = Options(o["causal"], None, None, o["causal_alignment"], None, o["scale"], o["dropout_p"])
        problem = describe("dense", inputs, options, cached=is_plain(call.q, call.k, call.v))
    except (TypeError, ValueError) as refusal:
        return f"fastattn does not take it: {refusal}."
    return _Call(call, problem, inputs)


def _translate(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> sdpa.SdpaCall:
    return sdpa.translate(*autocast(query, key, value), *args, **kwargs)


def _why_torch(call: _Call) -> str | None:
    """None if fastattn should compute the call, else a sentence that says why not."""
    decide = choose_cached if is_plain(*call.inputs[:3]) else choose
    if decide(call.problem, None).name == "reference":
        return "fastattn has no fused kernel for it here, only its reference."
    return None


def _attend(*args: Any, **kwargs: Any) -> Tensor:
    """torch's function, on fastattn where that is right."""
    call = _understand(*args, **kwargs)
    if isinstance(call, str) or _why_torch(call) is not None:
        return _torch_sdpa(*args, **kwargs)
    q, k, v, options, *_ = call.translated
    _translate_policies()
    return call.translated.finish(attention(q, k, v, **options))


# As torch's own, they are one node of a graph to torch.compile, looked into only after that.
_attend_in_graph = torch.compiler.allow_in_graph(_attend)


def _multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
    return _with_mode(_torch_multi_head, *args, **kwargs)


_multi_head_in_graph = torch.compiler.allow_in_graph(_multi_head_attention_forward)


# -------------------------------------------------------------------------------------------------------- the switch

# They may run forward passes, in autograd functions that compute theirs again. Some are torch functions in later
# versions of torch alone.
_BACKWARD_PASSES = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


class _Mode(TorchFunctionMode):
    """Sees the calls of torch's functions while it is on the stack of this thread; is off while it handles one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _torch_sdpa:
            return _attend_in_graph(*args, **kwargs)
        if any(kind not in _OWN_TYPES for kind in types):  # a subclass of Tensor has its say first
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


# ------------------------------------------------------------------------------------------------------- checkpoints


def _under(on: bool, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the switch at `on`, whenever and in whichever thread it runs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with use(on):
            return function(*args, **kwargs)

    return run


_KINDS = {
    SDPBackend.FLASH_ATTENTION: "flash_attention",
    SDPBackend.EFFICIENT_ATTENTION: "efficient_attention",
    SDPBackend.CUDNN_ATTENTION: "cudnn_attention",
    SDPBackend.OVERRIDEABLE: "fused_attention_overrideable",  # of devices that other packages add
}


def _operator_of_torch(tensors: Any, rest: Any) -> Any:
    """The fused operator by which torch's function would compute a call, given the arguments of fastattn's operator."""
    q, k, v, mask, bias, *_ = tensors
    kind = "flash_attention_for_cpu"
    if q.device.type != "cpu":
        options = Options(*rest[: len(Options._fields)])
        added = mask if bias is None else bias
        grouped = q.shape[1] != k.shape[1]
        call = (q, k, v, added, options.dropout_p, options.causal and added is None)
        chosen = torch._fused_sdp_choice(*call, scale=options.scale, enable_gqa=grouped)
        kind = _KINDS.get(SDPBackend(chosen), "efficient_attention")
    return getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default


def _translate_policies() -> None:
    """Has the policy of a selective checkpoint that is active mean fastattn's operator by torch's.

    Such a policy says by operator what a checkpoint keeps. Written for torch's function it names the operators behind
    that, which a call on fastattn does not reach: all would be computed again, and nobody would be told.
    """
    for level in range(torch._C._len_torch_dispatch_stack()):
        mode: Any = torch._C._get_dispatch_stack_at(level)
        policy = getattr(mode, "policy_fn", None)
        if callable(policy) and not isinstance(policy, _Policy):
            mode.policy_fn = _Policy(policy)


class _Policy:
    """A policy that keeps fastattn's results if the given one would keep them, or those of torch's operator.

    It asks at most once by each of the two names: a policy may count its calls.
    """

    def __init__(self, given: Callable[..., Any]) -> None:
        self._given = given

    def __call__(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
        answer = self._given(context, operator, *args, **kwargs)
        if operator is not torch.ops.fastattn.forward.default or _keeps(answer):
            return answer
        tensors, rest = args[: ops.FORWARD_TENSORS], args[ops.FORWARD_TENSORS :]
        as_torch = self._given(context, _operator_of_torch(tensors, rest), *tensors[:3])
        return as_torch if _keeps(as_torch) else answer


def _keeps(answer: Any) -> bool:
    """Whether a policy's answer, a CheckpointPolicy or a bool, says not to compute the results again."""
    return answer is True or not getattr(answer, "name", "RECOMPUTE").endswith("RECOMPUTE")


def _bind_checkpoints() -> None:
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
        return forward(ctx, _under(_mode in _stack(), run_function), *args)

    reentrant.forward = staticmethod(bound_forward)  # type: ignore[method-assign]
    frame: Any = getattr(torch.utils.checkpoint, "_CheckpointFrame", None)
    if frame is None:
        return
    init = frame.__init__

    @functools.wraps(init)
    def bound_init(self: Any, recompute_fn: Any, *args: Any, **kwargs: Any) -> None:
        init(self, _under(_mode in _stack(), recompute_fn), *args, **kwargs)

    frame.__init__ = bound_init


_bind_checkpoints()
