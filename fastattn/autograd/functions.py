"""Gradients of the operators, and the way a call takes: straight to the backend, or through torch's dispatcher.

`Attention` is the one autograd function, of all calls without a cache: those that a backend has prepared, those that go
to a backend, and those that go through the operators. Its backward is itself an autograd function, `AttentionBackward`,
whose gradients (the second derivatives) the reference has a formula for.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from ..backends import Needs, Prepared
from ..backends.layout_key import NO_LAYOUT, layout_key
from ..philox import draw_seed
from ..problem import Inputs, Options, check_tensors, describe
from ..reference import softmax_attention_double_backward
from . import operators, vmap
from .call import (
    DIFFERENTIABLE_AT,
    FORWARD_TENSORS,
    LEADING,
    Call,
    flatten,
    flatten_cache,
    kind_of,
    unflatten,
)

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_TRANSFORMS = (TransformType.Grad, TransformType.Jvp, TransformType.Vmap)
_NO_FORWARD_MODE = (
    "fastattn has no derivatives in forward mode (torch.func.jvp, jacfwd and hessian, torch.autograd.forward_ad): use "
    "reverse mode, torch.func.vjp or jacrev, for a Hessian jacrev(jacrev(f)), or call fastattn.reference.attention, "
    "which is plain PyTorch"
)


def is_plain(*tensors: Tensor) -> bool:
    """True if nothing but eager PyTorch looks on: no tracer, no mode, no function transform, no tensor subclass.

    Then the backend is called directly, which saves the operator's way through the dispatcher.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for x in tensors:  # not a generator, which the shortest calls would feel
        if type(x) not in _PLAIN_TYPES:
            return False
    return not tensors[0].is_meta


def is_batched(*grads: Tensor | None) -> bool:
    """True for output gradients of torch.autograd.grad(..., is_grads_batched=True), which no mode or stack tells of.

    The operators know what to do with them.
    """
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)


def _all_plain(inputs: Inputs) -> bool:
    """`is_plain` of every tensor of the call; what is no tensor at all will be refused later."""
    return is_plain(inputs.q, inputs.k, inputs.v, *[x for x in [*inputs][3:] if isinstance(x, Tensor)])


def _in_transform() -> bool:
    """True inside torch.func.grad, vjp, jacrev, vmap or jvp, and while forward-mode derivatives are recorded.

    Only an autograd function knows what to do there: the operators would refuse the first three, also under vmap, and
    forward mode, which has no formula here, would lose its tangents without a word.
    """
    if torch.compiler.is_dynamo_compiling():
        return False  # it has been asked already
    if forward_ad._current_level >= 0:
        return True
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return interpreter is not None and interpreter.key() in _TRANSFORMS


def attend(inputs: Inputs, options: Options, backend: str | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of a dense or varlen call, differentiable."""
    _check_no_gradient("alibi_slopes", inputs.alibi_slopes)
    return _attend(inputs, Call(options, backend))[:2]


def _attend(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The results of the operator `forward`; call.for_backward: even if nothing here tells that a backward follows."""
    in_transform = _in_transform()
    recorded = in_transform or (torch.is_grad_enabled() and _any_requires_grad(inputs))
    # torch.jit's traces run with and without gradients.
    traced = not torch.compiler.is_dynamo_compiling() and torch._C._get_tracing_state() is not None
    call.for_backward = call.for_backward or recorded or traced
    if torch.compiler.is_dynamo_compiling() and _dynamo_in_transform():
        return _traced_forward(*flatten(inputs, call), call.for_backward)
    if not in_transform and not _all_plain(inputs):
        check_tensors("dense", inputs)
        return _forward_operator(inputs, call)
    if recorded:
        return Attention.apply(*[*inputs][:FORWARD_TENSORS], call)
    return operators.run_forward(inputs, call)


def attend_cache(inputs: Inputs, options: Options, backend: str | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call with a cache. Raises ValueError if a gradient would be expected of it."""
    if torch.is_grad_enabled() and (_any_requires_grad(inputs) or _requires_grad(inputs.k_new, inputs.v_new)):
        raise ValueError(
            "attention_with_kv_cache is for inference only, but an input requires grad: call it under "
            "torch.no_grad() or torch.inference_mode()"
        )
    call = Call(options, backend)
    if _all_plain(inputs) and forward_ad._current_level < 0:
        return operators.run_cache(inputs, call)
    check_tensors("cache", inputs)
    if _any_dtensor(*inputs):
        from . import sharding

        sharding.check("cache", inputs, options, backend)
        return sharding.attend_cache(inputs, call)
    return torch.ops.fastattn.cache(*flatten_cache(inputs, call))


def _forward_operator(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, residual) by the operator. DTensors need strategies, which are registered first, and checks."""
    if _any_dtensor(*inputs):
        from . import sharding  # registers how the operators are sharded

        sharding.check(kind_of(inputs), inputs, call.options, call.backend)
    return torch.ops.fastattn.forward(*flatten(inputs, call), call.for_backward)[:3]


def _any_dtensor(*tensors: Tensor | None) -> bool:
    """Whether one of them is a DTensor, which none is while torch.distributed.tensor has not been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(x, module.DTensor) for x in tensors)


def new_seed() -> Tensor:
    """A seed from torch's default CPU generator, visible to tracers as a random operator."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return torch.ops.fastattn.draw_seed(torch.empty((), dtype=torch.int64, device="cpu"))
    return draw_seed()


def _check_no_gradient(name: str, x: Tensor | None) -> None:
    if torch.is_grad_enabled() and _requires_grad(x):
        raise ValueError(
            f"{name} has no gradient here, but requires grad: pass {name}.detach(), or learn a bias instead"
        )


def _any_requires_grad(inputs: Inputs) -> bool:
    return _requires_grad(*inputs.differentiable)


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _traced_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """One node of Dynamo's graph, for calls inside function transforms, which the operators would refuse.

    Whoever looks into the node later runs this module's code as it is.
    """
    return _attend(*unflatten(args, args[-1]))


def _dynamo_in_transform() -> bool:
    """Whether Dynamo traces a function transform: run by it as it traces, and a constant of the graph.

    Tells it of `_traced_forward` on the way, as an import of fastattn must not import Dynamo.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    torch.compiler.allow_in_graph(_traced_forward)
    return True


_dynamo_in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as assume_constant_result does


def _refuse_tangents(ctx: Any, *grad_inputs: Any) -> Any:
    raise NotImplementedError(_NO_FORWARD_MODE)


class Attention(torch.autograd.Function):
    """forward(*leading fields of Inputs, call) -> (out, lse, residual).

    Of a prepared call: forward(q, k, v, kept, call) -> out. `kept` is an empty list, which takes the results: torch
    needs a microsecond to record two more outputs, and nobody would see them.
    """

    jvp = staticmethod(_refuse_tangents)  # called where there are tangents alone

    @staticmethod
    def forward(*args: Any) -> Any:  # noqa: D102
        call = args[-1]
        if call.prepared is not None:
            q, k, v, kept, _ = args
            results = call.prepared.forward(q, k, v)
            kept.extend(results)
            return results[0]
        inputs = Inputs(*args[:-1])
        return operators.run_forward(inputs, call) if is_plain(*args[:3]) else _forward_operator(inputs, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: D102
        ctx.call = call = inputs[-1]
        if call.prepared is None:
            return _save(ctx, inputs[:-1], output)
        ctx.set_materialize_grads(False)
        return ctx.save_for_backward(*inputs[:3], *inputs[3])

    @staticmethod
    def backward(  # noqa: D102
        ctx: Any, dout: Tensor | None, dlse: Tensor | None = None, *_: None
    ) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved_tensors
        if call.prepared is not None and dout is not None and _fit(call.prepared, dout, saved):
            q, k, v, *results = saved
            return (*call.prepared.backward(q, k, v, results, dout, ctx.needs_input_grad[:3]), None, None)
        *tensors, out, lse, residual = saved
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if dout is None and dlse is None:
            return tuple(result)
        if dout is None:
            dout = torch.zeros_like(out)
        needs = [at < len(tensors) and ctx.needs_input_grad[at] for at in DIFFERENTIABLE_AT]
        gradients = _gradients((dout, dlse, out, lse, residual), Inputs(*tensors), call, needs)
        for at, need, gradient in zip(DIFFERENTIABLE_AT, needs, gradients, strict=True):
            if need:
                result[at] = gradient
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:  # noqa: D102
        *tensors, call = args
        return vmap.forward(_attend, info.batch_size, Inputs(*in_dims[:-1]), Inputs(*tensors), call)


def _save(ctx: Any, tensors: Sequence[Any], results: Sequence[Tensor]) -> None:
    ctx.mark_non_differentiable(results[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *results)


def _fit(prepared: Prepared, dout: Tensor, saved: tuple[Tensor, ...]) -> bool:
    """Whether a prepared call can compute these gradients.

    False if something looks on, or gradients are recorded, or hooks have brought saved tensors back in another layout.
    """
    if torch.is_grad_enabled() or forward_ad._current_level >= 0 or not is_plain(dout, *saved):
        return False
    if torch._C._functorch.is_legacy_batchedtensor(dout):  # `is_batched`, without its loop
        return False
    try:
        return prepared.layout_key == layout_key(*saved)
    except NO_LAYOUT:
        return False


def _gradients(leading: Sequence[Any], inputs: Inputs, call: Call, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, bias and sinks; differentiable again if gradients are recorded.

    leading: the tensors of `call.LEADING`. What is not needed is empty.
    """
    dout, dlse, out, *_ = leading
    in_transform = _in_transform()
    if not in_transform and (is_batched(dout, dlse) or not is_plain(dout, out, inputs.q)):
        return torch.ops.fastattn.backward(*leading, *flatten(inputs, call), needs)
    if in_transform or torch.is_grad_enabled():
        return AttentionBackward.apply(*leading, *[*inputs][:FORWARD_TENSORS], call, needs)
    return operators.run_backward(leading, inputs, call, needs)


def _with_implicit_replication(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for DTensors too: new tensors of the reference, such as positions, are equal on all ranks."""

    @functools.wraps(function)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if not _any_dtensor(*grads):
            return function(ctx, *grads)
        from torch.distributed.tensor.experimental import implicit_replication

        with implicit_replication():
            return function(ctx, *grads)

    return run


class AttentionBackward(torch.autograd.Function):
    """forward(*LEADING, *leading fields of Inputs, call, needs) -> gradients of q, k, v, bias and sinks."""

    jvp = staticmethod(_refuse_tangents)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:  # noqa: D102
        *tensors, call, needs = args
        leading, inputs = tensors[: len(LEADING)], Inputs(*tensors[len(LEADING) :])
        if is_plain(leading[0], inputs.q, inputs.k):
            return operators.run_backward(leading, inputs, call, needs)
        return torch.ops.fastattn.backward(*leading, *flatten(inputs, call), needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: D102
        *tensors, call, needs = inputs
        _save_again(ctx, tensors, call, needs)

    @staticmethod
    @_with_implicit_replication
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        dout, dlse, *tensors = ctx.saved_tensors
        inputs = Inputs(*tensors)
        problem = describe(kind_of(inputs), inputs, ctx.call.options, cached=False)
        tangents = tuple([c if need else None for c, need in zip(cotangents, ctx.needs, strict=True)])
        second = softmax_attention_double_backward(problem, inputs, dout, dlse, tangents)
        # The results are functions of the other arguments here, so their own gradients stay None.
        positions = [0, 1, *[len(LEADING) + at for at in DIFFERENTIABLE_AT]]
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for position, grad in zip(positions, second, strict=True):
            if ctx.needs_input_grad[position]:
                result[position] = grad
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:  # noqa: D102
        *tensors, call, needs = args
        return vmap.backward(_gradients, info.batch_size, in_dims[:-2], tensors, call, needs)


def _save_again(ctx: Any, tensors: Sequence[Any], call: Call, needs: Sequence[bool]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:2], *tensors[len(LEADING) :])
    ctx.call, ctx.needs = call, Needs(*needs)


# -------------------------------------------------------------------------------------------------------- the operators


def _setup_context_of_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The seed that is kept is a result, since arguments may have been computed again when results were not."""
    *results, seed = output
    given, call = unflatten(inputs, for_backward=True)
    if given.seed is not None:
        given = given._replace(seed=seed)
    ctx.call = call
    _save(ctx, [*given][:FORWARD_TENSORS], results)
    ctx.mark_non_differentiable(results[2], seed)


def _setup_context_of_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    n = len(LEADING)
    given, call = unflatten(inputs[n:])
    _save_again(ctx, [*inputs[:n], *[*given][:FORWARD_TENSORS]], call, inputs[-1])


class _Operators(torch.library.Library):
    """The operators' ways through autograd, which refuse tangents: they would lose them without a word."""

    def impl(self, op_name: Any, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """As of `torch.library.Library`; fn takes the set of dispatch keys first."""

        def refusing(keyset: Any, *inputs: Any, **keywords: Any) -> Any:
            if forward_ad._current_level >= 0 and any(map(_has_tangent, inputs)):
                raise NotImplementedError(_NO_FORWARD_MODE)
            return fn(keyset, *inputs, **keywords)

        return super().impl(op_name, refusing, *args, **kwargs)


def _has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None


def _cache_below_autograd(keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastattn.cache.default.redispatch(keyset & torch._C._after_autograd_keyset, *args)


_operators = _Operators("fastattn", "FRAGMENT")
for _name, _function, _setup in (
    ("forward", Attention, _setup_context_of_operator),
    ("backward", AttentionBackward, _setup_context_of_backward),
):
    torch.library.register_autograd(f"fastattn::{_name}", _function.backward, setup_context=_setup, lib=_operators)
_operators.impl("cache", _cache_below_autograd, "Autograd", with_keyset=True)


@torch.library.register_vmap("fastattn::forward")
def _vmap_forward_operator(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """For graphs of operators under vmap."""
    inputs, call = unflatten(args, args[-1])

    def run(inputs: Inputs, call: Call) -> tuple[Tensor, ...]:
        return torch.ops.fastattn.forward(*flatten(inputs, call), call.for_backward)

    return vmap.forward(run, info.batch_size, Inputs(*in_dims[:FORWARD_TENSORS]), inputs, call)


@torch.library.register_vmap("fastattn::backward")
def _vmap_backward_operator(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    n = len(LEADING)
    inputs, call = unflatten(args[n:])
    tensors = [*args[:n], *[*inputs][:FORWARD_TENSORS]]

    def run(leading: Sequence[Any], inputs: Inputs, call: Call, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        return torch.ops.fastattn.backward(*leading, *flatten(inputs, call), needs)

    return vmap.backward(run, info.batch_size, in_dims[: len(tensors)], tensors, call, args[-1])
