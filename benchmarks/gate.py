"""The correctness gate: only a correct result is timed.

Each output must be within the bound of `fastattn.cli.tolerance` around `fastattn.reference` in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import reference
from fastattn.cli.tolerance import bound, eager_error, max_error

from .cases import Case
from .data import Data, hidden_pairs, options, split, split_packed
from .rivals import eager_attention

OUTPUTS = ("out", "dq", "dk", "dv")
SCORES_AT_ONCE = 2**22
"""Scores that are evaluated together: 32 MiB in float64, a few times. One key/value head may have more."""


class Expected(NamedTuple):
    """One output in float64, and the largest error that a result may have."""

    values: Tensor
    limit: float


@dataclass(frozen=True)
class Verdict:
    """errors: the largest absolute error of each output. problems: a sentence for each wrong output."""

    errors: dict[str, float]
    problems: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether the result may be timed."""
        return not self.problems


def check(expected: dict[str, Expected], results: Sequence[Tensor]) -> Verdict:
    """Compares the outputs of one call, in the order of OUTPUTS, with the expected ones."""
    if len(results) != len(expected):
        return Verdict({}, (f"{len(results)} outputs instead of {len(expected)}",))
    errors, problems = {}, []
    for (name, wanted), result in zip(expected.items(), results, strict=True):
        if result.shape != wanted.values.shape:
            problems.append(f"{name} has shape {tuple(result.shape)} instead of {tuple(wanted.values.shape)}")
            continue
        errors[name] = max_error(result, wanted.values)
        if not errors[name] <= wanted.limit:
            problems.append(f"{name} is off by {errors[name]:.2e}, allowed are {wanted.limit:.2e}")
    return Verdict(errors, tuple(problems))


def expect(case: Case, data: Data) -> dict[str, Expected]:
    """Evaluates the case in float64, and for the limits with eager attention in its own dtype.

    It evaluates a few key/value heads of a sequence at a time, so that only their scores are in memory.
    """
    count = 4 if case.train else 1
    shapes = ((*data.q.shape[:-1], case.head_dim_v), data.q.shape, data.k.shape, data.v.shape)[:count]
    exact = [torch.zeros(shape, dtype=torch.float64, device=data.q.device) for shape in shapes]
    eager = [torch.zeros_like(x) for x in exact]
    for slices, part in _groups(case, data):
        _store(case, exact, slices, _evaluate(_reference, case, part, torch.float64))
        _store(case, eager, slices, _evaluate(_eager, case, part, case.torch_dtype))
    return {
        name: Expected(truth, bound(truth, eager_error(other, truth), case.torch_dtype))
        for name, truth, other in zip(OUTPUTS, exact, eager, strict=False)
    }


class _Slices(NamedTuple):
    """The part of the outputs that a group fills: index of the sequence in `split`, batch entry, heads."""

    sequence: int
    batch: slice
    queries: slice
    keys: slice


def _groups(case: Case, data: Data) -> Iterator[tuple[_Slices, Data]]:
    group = case.heads_q // case.heads_kv
    for number, part in enumerate(split(case, data)):
        heads = max(1, SCORES_AT_ONCE // (group * part.q.shape[2] * part.k.shape[2]))
        for b in range(part.q.shape[0]):
            for first in range(0, case.heads_kv, heads):
                end = min(first + heads, case.heads_kv)
                at = _Slices(number, slice(b, b + 1), slice(first * group, end * group), slice(first, end))
                q, dout = part.q[at.batch, at.queries], part.dout
                k, v = part.k[at.batch, at.keys], part.v[at.batch, at.keys]
                yield (
                    at,
                    part._replace(q=q, k=k, v=v, dout=None if dout is None else dout[at.batch, at.queries]),
                )


def _store(case: Case, outputs: Sequence[Tensor], at: _Slices, values: Sequence[Tensor]) -> None:
    """Writes the results of one group into the whole outputs. dk and dv have the lengths and heads of the keys."""
    lengths = (case.lengths_q, case.lengths_q, case.lengths_k, case.lengths_k)
    heads = (at.queries, at.queries, at.keys, at.keys)
    for output, value, length, head in zip(outputs, values, lengths, heads, strict=False):
        split_packed(output, length)[at.sequence][at.batch, head] = value.double()


def _evaluate(
    attention: Callable[[Case, Data], Tensor], case: Case, part: Data, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().to(dtype).requires_grad_(case.train) for x in (part.q, part.k, part.v))
    with torch.set_grad_enabled(case.train):
        out = attention(case, part._replace(q=q, k=k, v=v))
    if part.dout is None:
        return (out,)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), part.dout.to(dtype)))


def _reference(case: Case, part: Data) -> Tensor:
    out: Tensor = reference.attention(part.q, part.k, part.v, **options(case, part))
    return out


def _eager(case: Case, part: Data) -> Tensor:
    hidden = hidden_pairs(case, part.q.shape[2], part.k.shape[2], part.mask, part.q.device)
    return eager_attention(part.q, part.k, part.v, hidden, part.bias)
