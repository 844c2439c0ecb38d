"""A call without its tensors: one object, which is flattened into arguments where torch's operators want them.

The operators `forward` and `backward` share tensors, options and the name of a backend, in this order; those of `cache`
are its own. The tensors of `forward` are the leading fields of Inputs, and its options those of Options.
"""

from __future__ import annotations

from typing import Any

from ..backends import Backend, Prepared
from ..backends.dispatch import choose_cached
from ..problem import DIFFERENTIABLE, Inputs, Options, Problem, check_values, describe, metas_of
from ..problem.arguments import of_kind

_TENSORS, _OPTIONS = of_kind("dense")
_CACHE_TENSORS, _ = of_kind("cache")
FORWARD_TENSORS = len(_TENSORS)
FORWARD_ARGUMENTS = FORWARD_TENSORS + len(_OPTIONS) + 1
SEED = Inputs._fields.index("seed")
DIFFERENTIABLE_AT = tuple([Inputs._fields.index(name) for name in DIFFERENTIABLE])
"""Where the tensors that have gradients are among the arguments of `forward`."""
LEADING = ("dout", "dlse", "out", "lse", "residual")
"""The arguments of `backward` before those of `forward`."""


class Call:
    """What a call wants, beside its tensors.

    backend: the name of one that must do the call, or None.
    for_backward: results are kept for a backward pass.
    prepared: what a backend has prepared for calls of q, k and v like this one, see fast_path.py.
    """

    # Neither a tuple nor a dataclass: torch's transforms would look for tensors inside.
    __slots__ = ("_plan", "backend", "for_backward", "options", "prepared")

    def __init__(
        self, options: Options, backend: str | None, for_backward: bool = False, prepared: Prepared | None = None
    ) -> None:
        self.options, self.backend, self.for_backward, self.prepared = options, backend, for_backward, prepared
        self._plan: tuple[Any, Problem, Backend] | None = None

    def plan(self, inputs: Inputs, kind: str | None = None) -> tuple[Problem, Backend]:
        """The problem and the backend that computes it, made in the forward pass for the backward pass too.

        Made anew if saved tensors have come back changed. What is inside of index tensors is checked each time: it must
        not lead out of memory.
        """
        kind = kind or kind_of(inputs)
        metas = metas_of(kind, inputs)
        plan = self._plan  # once: another thread may change it meanwhile
        if plan is None or plan[0] != metas:
            problem = describe(kind, inputs, self.options, metas=metas)
            self._plan = plan = metas, problem, choose_cached(problem, self.backend)
        _, problem, backend = plan
        check_values(problem, inputs)
        return problem, backend


def kind_of(inputs: Inputs) -> str:
    """Of a call without a cache."""
    return "dense" if inputs.cu_seqlens_q is None else "varlen"


def flatten(inputs: Inputs, call: Call) -> tuple[Any, ...]:
    """The arguments that `forward` and `backward` share."""
    # As lists: torch 2.6 cannot trace a slice of a named tuple.
    return (*[*inputs][:FORWARD_TENSORS], *[*call.options][: len(_OPTIONS)], call.backend)


def unflatten(args: tuple[Any, ...], for_backward: bool = False) -> tuple[Inputs, Call]:
    """The inverse of `flatten`; more arguments may follow."""
    options = Options(*args[FORWARD_TENSORS : FORWARD_ARGUMENTS - 1])
    return Inputs(*args[:FORWARD_TENSORS]), Call(options, args[FORWARD_ARGUMENTS - 1], for_backward)


def flatten_cache(inputs: Inputs, call: Call) -> tuple[Any, ...]:
    """The arguments of `cache`."""
    return (*[getattr(inputs, x.name) for x in _CACHE_TENSORS], *call.options, call.backend)


def unflatten_cache(args: tuple[Any, ...]) -> tuple[Inputs, Call]:
    """The inverse of `flatten_cache`."""
    n = len(_CACHE_TENSORS)
    tensors = {x.name: given for x, given in zip(_CACHE_TENSORS, args[:n], strict=True)}
    return Inputs(**tensors), Call(Options(*args[n:-1]), args[-1])
