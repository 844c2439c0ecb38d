"""torch.func.vmap: a batch of problems as one problem with a larger batch.

Sinks of their own, dropout, whose mask goes by batch and head, and packed sequences do not fit into that: there the
problems are computed one by one. Either way the results are those of a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..problem import PER_SEQUENCE, Inputs
from . import operators

Run = Callable[..., tuple[Tensor, ...]]
Result = tuple[tuple[Tensor, ...], tuple[int | None, ...]]

_LEADING = len(operators.RESULTS)


def forward(run: Run, size: int, in_dims: Sequence[Any], args: tuple[Any, ...]) -> Result:
    """`run` (the operator `forward`) over the dimension in_dims of each argument: (results, their dimensions)."""
    inputs, options, backend = operators.split_arguments(args)
    dims: Any = Inputs(*in_dims[: operators.FORWARD_TENSORS])
    if inputs.cu_seqlens_q is not None or dims.sinks is not None or options.dropout_p:
        return _one_by_one(run, size, in_dims, args)
    batch = _without(inputs.q.shape, in_dims[0])[0]
    folded = _fold(inputs, dims, size, batch, separate_bias=False)
    results = run(*operators.join_arguments(folded, options, backend), args[-1])
    found = [(x, None) if operators.is_none(x) else (x.unflatten(0, (size, batch)), 0) for x in results]
    return tuple(x for x, _ in found), tuple(dim for _, dim in found)


def backward(run: Run, size: int, in_dims: Sequence[Any], args: tuple[Any, ...]) -> Result:
    """Likewise for the operator `backward`."""
    gradients, needs = args[:_LEADING], args[-1]
    inputs, options, backend = operators.split_arguments(args[_LEADING:-1])
    dims: Any = Inputs(*in_dims[_LEADING : _LEADING + operators.FORWARD_TENSORS])
    if inputs.cu_seqlens_q is not None or inputs.sinks is not None or options.dropout_p:
        return _one_by_one(run, size, in_dims, args)
    batch = _without(inputs.q.shape, in_dims[_LEADING])[0]
    folded = _fold(inputs, dims, size, batch, separate_bias=needs[3])
    outer = [
        x if x is not None and dim is None and operators.is_none(x) else _into_batch(x, dim, size, batch)
        for x, dim in zip(gradients, in_dims, strict=False)
    ]
    *grads, dbias, dsinks = run(*outer, *operators.join_arguments(folded, options, backend), needs)
    separated = [x.unflatten(0, (size, batch)) if need else x for x, need in zip(grads, needs, strict=False)]
    if needs[3]:
        assert inputs.bias is not None
        own = _without(inputs.bias.shape, dims.bias)
        dbias = dbias.unflatten(0, (size, batch))
        if len(own) < 4 or own[0] == 1:
            dbias = dbias.sum(dim=1)
        dbias = dbias.reshape(size, *own)
    found = [(x, 0 if need else None) for x, need in zip((*separated, dbias, dsinks), needs, strict=True)]
    return tuple(x for x, _ in found), tuple(dim for _, dim in found)


def _one_by_one(run: Run, size: int, in_dims: Sequence[Any], args: tuple[Any, ...]) -> Result:
    def of_all(pick: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, ...]:
        pairs = zip(args, in_dims)  # noqa: B905
        return run(*(pick(x, d) if isinstance(x, Tensor) and d is not None else x for x, d in pairs))

    results = [of_all(lambda x, d, i=i: x.select(d, i)) for i in range(size)]  # type: ignore[misc]
    # Without any, one of zeros tells the shapes.
    results = results or [of_all(lambda x, d: x.new_zeros(_without(x.shape, d)))]
    stacked = tuple(torch.stack(parts)[:size] for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _without(shape: Sequence[int], dim: int | None) -> list[int]:
    return [n for i, n in enumerate(shape) if i != dim]


def _into_batch(x: Tensor | None, dim: int | None, size: int, batch: int) -> Any:
    """(size, 1 or batch, ...) from x with the dimension `dim` of that size, or without, as (size * batch, ...)."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(size, batch, *x.shape[2:]).flatten(0, 1)


def _fold(inputs: Inputs, dims: Any, size: int, batch: int, *, separate_bias: bool) -> Inputs:
    """The problems' tensors with all problems in the batch; what is one for all of them stays so."""
    whole = ("q", "k", "v", *PER_SEQUENCE)
    folded = {name: _into_batch(getattr(inputs, name), getattr(dims, name), size, batch) for name in whole}
    for name, rank in (("mask", 4), ("bias", 4), ("alibi_slopes", 2)):
        x, dim = getattr(inputs, name), getattr(dims, name)
        if x is None:
            continue
        own = _without(x.shape, dim)
        shared = len(own) < rank or own[0] == 1
        if dim is None and shared and not (name == "bias" and separate_bias):
            continue
        x = x if dim is None else x.movedim(dim, 0)
        leading = () if dim is None else (size,)
        x = x.reshape(*leading, *(1,) * (rank - len(own)), *own)
        folded[name] = _into_batch(x, 0 if leading else None, size, batch)
    return inputs._replace(**folded)
