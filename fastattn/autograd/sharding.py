"""Attention on DTensors (torch.distributed.tensor): which part of a call each rank computes.

Batches and heads are independent of one another. A mesh dimension may shard either, and each rank then computes its
part without communication. Inputs with any other placement are redistributed by DTensor first. The gradient of what
the ranks of a mesh dimension share (sinks, a bias that broadcasts, the one key head of MQA) is a partial sum.

torch does not import torch.distributed.tensor by itself, so `fastattn.autograd` imports this module when it meets the
first DTensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ..backends.dispatch import choose
from ..problem import CACHE_NAMES, DIFFERENTIABLE, Inputs, Options, describe
from ..problem.arguments import TENSORS
from ..problem.shapes import dims_of
from . import operators
from .call import FORWARD_TENSORS, LEADING, Call, flatten, flatten_cache, unflatten


def check(kind: str, inputs: Inputs, options: Options, backend: str | None) -> None:
    """Refuses what cannot be computed in parts, and what no call can be: DTensor would wrap the error in its own.

    Raises TypeError or ValueError that names the argument.
    """
    names = CACHE_NAMES if kind == "cache" else {}
    given = {names.get(field, field): x for field, x in inputs._asdict().items() if isinstance(x, Tensor)}
    given.pop("seed", None)
    mesh = next(x.device_mesh for x in given.values() if isinstance(x, DTensor))
    for name, x in given.items():
        if not isinstance(x, DTensor):
            raise TypeError(
                f"{name} must be a DTensor, as another argument is one, got {type(x).__name__}: see "
                "torch.distributed.tensor.distribute_tensor"
            )
        if x.device_mesh != mesh:
            raise ValueError(f"{name} must be on the mesh of the other arguments, {mesh}, got {x.device_mesh}")
    problem = describe(kind, inputs, options, cached=False)
    if backend is not None:
        choose(problem, backend)
    if options.dropout_p:
        raise ValueError(
            f"dropout_p must be 0 for DTensors, got {options.dropout_p!r}: the mask depends on the batch and head in "
            "the whole call, and a rank counts those of its part alone. Call attention on local tensors, with a seed "
            "of its own on each rank (torch.distributed.tensor.experimental.local_map)"
        )


# ----------------------------------------------------------------------------------------------- dimensions of tensors


class _Dims(NamedTuple):
    """The dimensions of a tensor that run over batches and over heads; None where there is none."""

    batch: int | None
    heads: int | None


_NEITHER = _Dims(None, None)


def _dims_of_inputs(inputs: Any) -> dict[str, _Dims]:
    """Of the tensors that the call has, given those or anything with their shapes."""
    packed = inputs.cu_seqlens_q is not None
    rows = _Dims(None if packed else 0, 1)
    cache = rows if inputs.block_table is None else _Dims(None, 1)  # a page belongs to any batch
    dims = {
        **dict.fromkeys(("q", "k_new", "v_new"), rows),
        **dict.fromkeys(("k", "v"), cache),
        "mask": _dims_of_scores(inputs.mask, packed),
        "bias": _dims_of_scores(inputs.bias, packed),
        "block_table": _Dims(0, None),
    }
    for argument, x in zip(TENSORS, inputs, strict=True):
        for dims_of_shape in map(dims_of, argument.shapes) if x is not None else ():
            if argument.name not in dims and len(dims_of_shape) == len(x.shape):
                where = [dims_of_shape.index(dim) if dim in dims_of_shape else None for dim in ("batch", "heads_q")]
                dims[argument.name] = _Dims(None if packed else where[0], where[1])
    return {name: dims.get(name, _NEITHER) for name, x in zip(Inputs._fields, inputs, strict=True) if x is not None}


def _dims_of_scores(x: Any, packed: bool) -> _Dims:
    """Of a tensor that broadcasts to (batch, heads_q, seqlen_q, seqlen_k)."""
    if x is None:
        return _NEITHER
    batch = len(x.shape) - 4
    own = [dim if dim >= 0 and x.shape[dim] != 1 else None for dim in (batch, batch + 1)]
    return _Dims(None if packed else own[0], own[1])


def _dims_of_result(x: Any, inputs: Any) -> _Dims:
    """Of a result of `forward` or its gradient: it lies as out, as lse, or is empty."""
    packed, rank = inputs.cu_seqlens_q is not None, len(x.shape)
    if packed:
        return {3: _Dims(None, 1), 2: _Dims(None, 0)}.get(rank, _NEITHER)
    return _Dims(0, 1) if rank >= 3 else _NEITHER


# ----------------------------------------------------------------------------------------- ways to share a call's work


class _Plan(NamedTuple):
    """What the ranks of one mesh dimension share out: batches, heads, or nothing (None: each computes all).

    shared_keys: the heads of queries are shared out, and every rank has the one head of keys.
    """

    axis: str | None
    shared_keys: bool = False

    def placement(self, dims: _Dims, name: str = "") -> Any:
        """Of a tensor with these dimensions; name: of an argument."""
        dim = None if self.axis is None else getattr(dims, self.axis)
        shared = self.shared_keys and name in ("k", "v", "k_new", "v_new")
        return Replicate() if dim is None or shared else Shard(dim)

    def gradient(self, dims: _Dims, name: str) -> Any:
        """Of the gradient of an argument."""
        placement = self.placement(dims, name)
        return Partial() if self.axis is not None and placement == Replicate() else placement


_ALL, _BATCH, _HEADS, _HEADS_OF_QUERIES = _Plan(None), _Plan("batch"), _Plan("heads"), _Plan("heads", shared_keys=True)


def _keeps_groups(inputs: Any, parts: int) -> bool:
    """Whether, with heads in so many shards, queries find their keys in the shard of the same rank."""
    heads_q, heads_kv = inputs.q.shape[1], inputs.k.shape[1]
    return heads_q == heads_kv or heads_kv % parts == 0


def _plans(inputs: Any) -> list[_Plan]:
    """The plans that are right on each dimension of the mesh, and on several at once, as DTensor combines them."""
    mesh = inputs.q.mesh
    plans = [_ALL] if inputs.cu_seqlens_q is not None else [_ALL, _BATCH]
    sizes = [mesh.size(dim) for dim in range(mesh.ndim)]
    parts = [math.prod(some) for n in range(1, mesh.ndim + 1) for some in itertools.combinations(sizes, n)]
    heads_q, heads_kv = inputs.q.shape[1], inputs.k.shape[1]
    if all(_keeps_groups(inputs, n) for n in parts if n <= heads_kv):  # DTensor makes no more shards than heads
        plans.append(_HEADS)
    if heads_kv == 1 < heads_q:
        plans.append(_HEADS_OF_QUERIES)
    return plans


# ------------------------------------------------------------------------------------------- the operators' strategies

_Strategies = list[tuple[list[Any], list[Any]]]  # placements of the results, placements of the arguments


@register_sharding(torch.ops.fastattn.forward.default)
def _shard_forward(*args: Any) -> _Strategies:
    inputs, call = unflatten(args)
    like = operators.fake_forward(*_without_memory(flatten(inputs, Call(call.options, None))), args[-1])
    results = [_dims_of_result(x, inputs) for x in like]
    return [([plan.placement(dims) for dims in results], _placements(plan, args)) for plan in _plans(inputs)]


@register_sharding(torch.ops.fastattn.backward.default)
def _shard_backward(*args: Any) -> _Strategies:
    leading, arguments, needs = args[: len(LEADING)], args[len(LEADING) :], args[-1]
    inputs, _ = unflatten(arguments)
    dims = _dims_of_inputs(inputs)
    wanted = [name if need and name in dims else None for name, need in zip(DIFFERENTIABLE, needs, strict=True)]
    return [
        (
            [Replicate() if name is None else plan.gradient(dims[name], name) for name in wanted],
            [
                *(None if x is None else plan.placement(_dims_of_result(x, inputs)) for x in leading),
                *_placements(plan, arguments),
            ],
        )
        for plan in _plans(inputs)
    ]


def _placements(plan: _Plan, args: Sequence[Any]) -> list[Any]:
    """Of each argument of `forward`; None for what is no tensor."""
    dims = _dims_of_inputs(unflatten(tuple(args))[0])
    tensors = [plan.placement(dims[name], name) if name in dims else None for name in Inputs._fields]
    return tensors[:FORWARD_TENSORS] + [None] * (len(args) - FORWARD_TENSORS)


def _without_memory(args: Sequence[Any]) -> list[Any]:
    """The arguments with meta tensors in the place of DTensors, or of what describes them."""
    return [
        torch.empty(x.shape, dtype=getattr(x, "tensor_meta", x).dtype, device="meta") if hasattr(x, "placements") else x
        for x in args
    ]


# ---------------------------------------------------------------------------------------------------------- the cache


def attend_cache(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call with a cache, of DTensors that `check` has seen.

    This is no strategy of the operator: DTensor would move a cache to where a strategy wants it, and the new keys
    would go into the copy. Here the caches stay, and all else follows them.
    Raises ValueError for caches that are not sharded by batch or heads.
    """
    k_cache: Any = inputs.k
    mesh, dims = k_cache.device_mesh, _dims_of_inputs(inputs)
    plans = [_plan_of_cache(inputs, dims["k"], dim) for dim in range(mesh.ndim)]
    parts = math.prod(mesh.size(dim) for dim, plan in enumerate(plans) if plan == _HEADS)
    if not _keeps_groups(inputs, parts):
        raise ValueError(
            f"k_cache must have a number of heads that {parts} ranks can share, a multiple of {parts}, to serve "
            f"{inputs.q.shape[1]} heads of q, got {k_cache.shape[1]}"
        )
    local: dict[str, Any] = {}
    for name, x in inputs._asdict().items():
        placements = [plan.placement(dims[name], name) for plan in plans] if name in dims else []
        if name == "v" and list(x.placements) != placements:
            raise ValueError(f"v_cache must have the placements of k_cache, {k_cache.placements}, got {x.placements}")
        local[name] = x.redistribute(mesh, placements).to_local() if name in dims else None
    results = operators.run_cache(Inputs(**local), call)
    whole = operators.fake_cache(*_without_memory(flatten_cache(inputs, Call(call.options, None))))
    placements = [plan.placement(_Dims(0, 1)) for plan in plans]
    out, lse = (
        DTensor.from_local(x, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
        for x, like in zip(results, whole, strict=True)
    )
    return out, lse


def _plan_of_cache(inputs: Any, dims: _Dims, mesh_dim: int) -> _Plan:
    """What the placement of k_cache on a mesh dimension means."""
    placement, queries = inputs.k.placements[mesh_dim], inputs.q.placements[mesh_dim]
    if placement == Replicate():
        return _HEADS_OF_QUERIES if inputs.k.shape[1] == 1 and queries == Shard(1) else _ALL
    for plan in (_BATCH, _HEADS):
        if placement == plan.placement(dims):
            return plan
    ways = "by heads, Shard(1)," if dims.batch is None else "by batch or heads, Shard(0) or Shard(1),"
    raise ValueError(f"k_cache must be sharded {ways} or replicated, got {inputs.k.placements}")
