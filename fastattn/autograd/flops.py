"""What torch.utils.flop_counter counts for the operators: two operations for each multiplication with its addition.

Products of matrices alone are counted, as torch does: two in a forward pass, five in a backward pass of which nothing
is left out. Of the scores those count that the kernels compute: what causal, window, kv_lengths and packing hide does
not, what a mask hides does.
"""

from __future__ import annotations

import importlib.abc
import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..backends import Needs
from ..problem import Inputs, Problem, describe
from .call import FORWARD_ARGUMENTS, Call, kind_of, unflatten, unflatten_cache

_COUNTER = "torch.utils.flop_counter"


def visible_pairs(problem: Problem, inputs: Inputs) -> int:
    """Pairs of a query and a key that it sees, whatever `mask` says, over all query heads.

    Lengths that cannot be known, those of fake and meta tensors, are taken for the longest there may be, kv_lengths,
    or for the same in all sequences, cu_seqlens; an unknown q_offset counts as none. Sizes may be symbolic.
    """
    return problem.heads_q * sum(count * _pairs(problem, *lengths) for count, *lengths in _sequences(problem, inputs))


def _sequences(problem: Problem, inputs: Inputs) -> list[tuple[int, int, int, int]]:
    """(number of sequences, queries of each, keys of each, offset of each)."""
    batch, varlen = problem.batch, problem.kind == "varlen"
    ends_q, ends_k = _values(inputs.cu_seqlens_q), _values(inputs.cu_seqlens_k)
    lengths, offsets = _values(inputs.kv_lengths), _values(inputs.q_offset)
    if ends_q is None or ends_k is None:
        if varlen or (lengths is None and offsets is None):
            shares = torch.sym_max(batch, 1) if varlen else 1
            queries, keys = problem.seqlen_q // shares, problem.seqlen_k // shares
            return [(batch, queries, keys, _aligned(problem, queries, keys))]
        all_queries, all_keys = [problem.seqlen_q] * batch, [problem.seqlen_k] * batch
    else:
        all_queries, all_keys = ([end - start for start, end in pairwise(ends)] for ends in (ends_q, ends_k))
    if lengths is not None:
        all_keys = [min(n, length + problem.seqlen_new) for n, length in zip(all_keys, lengths, strict=True)]
    if offsets is None:
        offsets = [_aligned(problem, *pair) for pair in zip(all_queries, all_keys, strict=True)]
    return [(1, *lengths) for lengths in zip(all_queries, all_keys, offsets, strict=True)]


def _aligned(problem: Problem, queries: int, keys: int) -> int:
    return keys - queries if problem.bottom_right else 0


def _values(x: Tensor | None) -> list[int] | None:
    """None where they cannot be known."""
    known = x is not None and type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta
    return x.tolist() if x is not None and known else None


def _pairs(problem: Problem, queries: int, keys: int, offset: int) -> int:
    """Query i sees the keys from i + offset - left to i + offset + right that there are."""
    left, right = problem.window_left, problem.window_right
    to = queries * keys if right is None else _clamped_sum(offset + right + 1, queries, keys)
    return to - (0 if left is None else _clamped_sum(offset - left, queries, keys))


def _clamped_sum(start: int, count: int, most: int) -> int:
    """The sum of min(max(x, 0), most) over the `count` numbers x from `start` on."""

    def below(end: int) -> int:
        rising = torch.sym_min(torch.sym_max(end, 0), most + 1)
        return rising * (rising - 1) // 2 + torch.sym_max(end - most - 1, 0) * most

    return below(start + count) - below(start)


def forward_flops(*args: Any, out_val: Any = None) -> int:
    """Of the operator `forward`: the scores and their product with v."""
    problem, pairs = _described(None, *unflatten(args))
    return 2 * pairs * (problem.head_dim + problem.head_dim_v)


def backward_flops(*args: Any, out_val: Any = None) -> int:
    """Of the operator `backward`: the scores again, the gradient of the probabilities, and those asked for."""
    problem, pairs = _described(None, *unflatten(args[-1 - FORWARD_ARGUMENTS : -1]))
    needs = Needs(*args[-1])
    dprobs = needs.q or needs.k or needs.bias or needs.sinks
    return 2 * pairs * (problem.head_dim * (1 + needs.q + needs.k) + problem.head_dim_v * (dprobs + needs.v))


def cache_flops(*args: Any, out_val: Any = None) -> int:
    """Of the operator `cache`, as of `forward`."""
    problem, pairs = _described("cache", *unflatten_cache(args))
    return 2 * pairs * (problem.head_dim + problem.head_dim_v)


def _described(kind: str | None, inputs: Inputs, call: Call) -> tuple[Problem, int]:
    problem = describe(kind or kind_of(inputs), inputs, call.options, cached=False)
    return problem, visible_pairs(problem, inputs)


def register(module: Any) -> None:
    """Tells torch.utils.flop_counter, `module`, of the formulas; more than once does no harm."""
    for name, formula in (("forward", forward_flops), ("backward", backward_flops), ("cache", cache_flops)):
        operator = getattr(torch.ops.fastattn, name)
        if operator not in module.flop_registry:
            module.register_flop_formula(operator, get_raw=True)(formula)


class _Loader(importlib.abc.Loader):
    """Loads the counter as `given` would, and registers the formulas."""

    def __init__(self, given: Any) -> None:
        self._given = given

    def create_module(self, spec: Any) -> Any:
        return self._given.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._given  # for readers of its source
        self._given.exec_module(module)
        register(module)


class _Watch(importlib.abc.MetaPathFinder):
    """Registers the formulas whenever the counter is imported or reloaded.

    The counter imports Triton, which takes longer than all of fastattn. Only programs that count should pay for it.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _COUNTER:
            return None
        finders = [finder.find_spec for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        specs = (find_spec(fullname, path, target) for find_spec in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register_once_imported() -> None:
    """Registers the formulas now if the counter is imported already, and at each import of it from now on."""
    if _COUNTER in sys.modules:
        register(sys.modules[_COUNTER])
    # By name: a reload of this module makes another class.
    others = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]
    sys.meta_path[:] = [_Watch(), *others]
