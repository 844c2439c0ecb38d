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
from .call import LEADING, Call

Results = tuple[Tensor, ...]
Forward = Callable[[Inputs, Call], Results]
Backward = Callable[[Sequence[Any], Inputs, Call, Sequence[bool]], Results]
Mapped = tuple[Results, tuple[int | None, ...]]


def forward(run: Forward, size: int, dims: Any, inputs: Inputs, call: Call) -> Mapped:
    """`run` over the dimension of each tensor that `dims`, an Inputs of numbers, names: (results, their dimensions)."""
    if inputs.cu_seqlens_q is not None or dims.sinks is not None or call.options.dropout_p:
        return _one_by_one(lambda *tensors: run(Inputs(*tensors), call), size, dims, inputs)
    batch = _without(inputs.q.shape, dims.q)[0]
    results = run(_fold(inputs, dims, size, batch, separate_bias=False), call)
    found = [(x, None) if operators.is_none(x) else (x.unflatten(0, (size, batch)), 0) for x in results]
    return tuple(x for x, _ in found), tuple(dim for _, dim in found)


def backward(
    run: Backward,
    size: int,
    in_dims: Sequence[int | None],
    tensors: Sequence[Any],
    call: Call,
    needs: Sequence[bool],
) -> Mapped:
    """Likewise for the gradients; tensors: those of `call.LEADING`, then the inputs. in_dims: theirs."""
    n = len(LEADING)
    inputs, dims = Inputs(*tensors[n:]), Inputs(*in_dims[n:])  # type: ignore[arg-type]
    if inputs.cu_seqlens_q is not None or inputs.sinks is not None or call.options.dropout_p:
        return _one_by_one(lambda *one: run(one[:n], Inputs(*one[n:]), call, needs), size, in_dims, tensors)
    batch = _without(inputs.q.shape, dims.q)[0]  # type: ignore[arg-type]
    folded = _fold(inputs, dims, size, batch, separate_bias=needs[3])
    outer = [
        x if x is not None and dim is None and operators.is_none(x) else _into_batch(x, dim, size, batch)
        for x, dim in zip(tensors[:n], in_dims[:n], strict=True)
    ]
    *grads, dbias, dsinks = run(outer, folded, call, needs)
    separated = [x.unflatten(0, (size, batch)) if need else x for x, need in zip(grads, needs, strict=False)]
    if needs[3]:
        assert inputs.bias is not None
        own = _without(inputs.bias.shape, dims.bias)  # type: ignore[arg-type]
        dbias = dbias.unflatten(0, (size, batch))
        if len(own) < 4 or own[0] == 1:
            dbias = dbias.sum(dim=1)
        dbias = dbias.reshape(size, *own)
    found = [(x, 0 if need else None) for x, need in zip((*separated, dbias, dsinks), needs, strict=True)]
    return tuple(x for x, _ in found), tuple(dim for _, dim in found)


def _one_by_one(run: Callable[..., Results], size: int, dims: Sequence[int | None], tensors: Sequence[Any]) -> Mapped:
    def of_all(pick: Callable[[Tensor, int], Tensor]) -> Results:
        return run(*(pick(x, d) if x is not None and d is not None else x for x, d in zip(tensors, dims, strict=True)))

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
