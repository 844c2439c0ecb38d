"""The operators `torch.ops.fastattn.*`: what torch.compile, export and other tracers see of fastattn.

Each is registered once, by schema, with the function that runs it and the fake kernel that tells tracers the shapes
and strides of its results. The same functions are called directly where nothing traces (see `fastattn.autograd`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, Needs, Results, empty_grad, empty_results
from ..backends.dispatch import choose, choose_cached
from ..philox import draw_seed
from ..problem import DIFFERENTIABLE, Inputs, Options, Problem, check_results, check_values, describe
from ..problem.arguments import of_kind, schema

# The arguments that `forward` and `backward` share are tensors, options and the name of a backend, in this order. The
# tensors are the leading fields of Inputs, the options those of Options.
_TENSORS, _OPTIONS = of_kind("dense")
_CACHE_TENSORS, _ = of_kind("cache")
FORWARD_TENSORS = len(_TENSORS)
FORWARD_ARGUMENTS = FORWARD_TENSORS + len(_OPTIONS) + 1
SEED = Inputs._fields.index("seed")
DIFFERENTIABLE_AT = tuple([Inputs._fields.index(name) for name in DIFFERENTIABLE])
"""Where the tensors that have gradients are among the arguments of `forward`."""
RESULTS = ("dout", "dlse", "out", "lse", "residual")
"""The arguments of `backward` before those of `forward`."""

# An empty tensor stands for a result that there is not. The last result of `forward` is a copy of its seed, for the
# backward pass: who saves the results instead of computing them again, as policies of checkpoints do, has saved the
# mask with them, although the seed may be drawn again.
torch.library.define(
    "fastattn::forward",
    f"({schema('dense')}, str? backend, bool for_backward) -> "
    "(Tensor out, Tensor lse, Tensor residual, Tensor seed_used)",
)
torch.library.define(
    "fastattn::backward",
    f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor residual, {schema('dense')}, str? backend, "
    "bool[] needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
)
torch.library.define(
    "fastattn::cache",
    f"({schema('cache')}, str? backend) -> (Tensor out, Tensor lse)",
)
# The tag keeps a backward pass from drawing again what the forward drew. It does not keep AOTAutograd from merging two
# draws as a common subexpression, which would give two layers one mask; so each takes an uninitialised tensor of its
# own, and those are never merged.
torch.library.define("fastattn::draw_seed", "(Tensor fresh) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def split_arguments(args: tuple[Any, ...]) -> tuple[Inputs, Options, str | None]:
    """The arguments of `forward` as (inputs, options, backend)."""
    return (
        Inputs(*args[:FORWARD_TENSORS]),
        Options(*args[FORWARD_TENSORS : FORWARD_ARGUMENTS - 1]),
        args[FORWARD_ARGUMENTS - 1],
    )


def join_arguments(inputs: Inputs, options: Options, backend: str | None) -> tuple[Any, ...]:
    """The inverse of `split_arguments`."""
    # As lists: torch 2.6 cannot trace a slice of a named tuple.
    return (*[*inputs][:FORWARD_TENSORS], *[*options][: len(_OPTIONS)], backend)


def join_cache_arguments(inputs: Inputs, options: Options, backend: str | None) -> tuple[Any, ...]:
    """The arguments of `cache`."""
    return (*[getattr(inputs, x.name) for x in _CACHE_TENSORS], *options, backend)


def split_cache_arguments(args: tuple[Any, ...]) -> tuple[Inputs, Options, str | None]:
    """The inverse of `join_cache_arguments`."""
    n = len(_CACHE_TENSORS)
    tensors = {x.name: given for x, given in zip(_CACHE_TENSORS, args[:n], strict=True)}
    return Inputs(**tensors), Options(*args[n:-1]), args[-1]


def _kind(inputs: Inputs) -> str:
    return "dense" if inputs.cu_seqlens_q is None else "varlen"


def _plan(kind: str, inputs: Inputs, options: Options, backend: str | None) -> tuple[Problem, Backend]:
    problem = describe(kind, inputs, options)
    chosen = choose_cached(problem, backend)
    check_values(problem, inputs)
    return problem, chosen


# ----------------------------------------------------------------------------------------- what runs on real tensors


def run_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (out, lse, residual); arguments as in the schema."""
    inputs, options, name = split_arguments(args)
    problem, backend = _plan(_kind(inputs), inputs, options, name)
    return filled(backend.forward(problem, inputs, args[-1]))


def _run_forward_operator(*args: Any) -> tuple[Tensor, ...]:
    return *run_forward(*args), _copy_seed(args)


def _copy_seed(args: tuple[Any, ...]) -> Tensor:
    seed = args[SEED]
    return args[0].new_empty(0) if seed is None else seed.clone()


def run_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, residual: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """Computes the gradients of q, k, v, bias and sinks."""
    inputs, options, name = split_arguments(args)
    problem, backend = _plan(_kind(inputs), inputs, options, name)
    results = Results(out, lse, None if is_none(residual) else residual)
    check_results(problem, inputs, *results)
    grads = backend.backward(problem, inputs, results, dout, dlse, Needs(*args[-1]))
    return tuple([dout.new_empty(0) if grad is None else grad for grad in grads])


def filled(results: Results) -> tuple[Tensor, Tensor, Tensor]:
    """The results as the operators pass them on."""
    out, lse, residual = results
    return out, lse, out.new_empty(0) if residual is None else residual


def is_none(x: Tensor) -> bool:
    """Whether it stands for a missing result."""
    return x.ndim == 1 and x.shape[0] == 0


def run_cache(*args: Any) -> tuple[Tensor, Tensor]:
    """Writes the new keys and values into the cache and computes (out, lse)."""
    inputs, options, name = split_cache_arguments(args)
    problem, backend = _plan("cache", inputs, options, name)
    return backend.decode(problem, inputs)


def run_draw_seed(fresh: Tensor) -> Tensor:
    """Draws a seed; `fresh` is not read."""
    return draw_seed()


for _name, _run in (
    ("forward", _run_forward_operator),
    ("backward", run_backward),
    ("cache", run_cache),
    ("draw_seed", run_draw_seed),
):
    torch.library.impl(f"fastattn::{_name}", "CompositeExplicitAutograd")(_run)


# ------------------------------------------------------------------------------------------ what tracers see of them


def _outputs(kind: str, inputs: Inputs, options: Options, backend: str | None, for_backward: bool) -> Results:
    problem = describe(kind, inputs, options, cached=False)
    if backend is not None:
        choose(problem, backend)  # an impossible choice is refused while tracing, not when the program runs
    return empty_results(problem, inputs.q, for_backward)


@torch.library.register_fake("fastattn::forward")
def fake_forward(*args: Any) -> tuple[Tensor, ...]:
    """Results of the right shapes and strides for tensors of any kind."""
    inputs, options, backend = split_arguments(args)
    return *filled(_outputs(_kind(inputs), inputs, options, backend, args[-1])), _copy_seed(args)


@torch.library.register_fake("fastattn::cache")
def fake_cache(*args: Any) -> tuple[Tensor, Tensor]:
    """Likewise."""
    return _outputs("cache", *split_cache_arguments(args), for_backward=False)[:2]


@torch.library.register_fake("fastattn::backward")
def _fake_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, residual: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    inputs, _, _ = split_arguments(args)
    return tuple(
        [
            empty_grad(x) if need and x is not None else dout.new_empty(0)
            for x, need in zip(inputs.differentiable, args[-1], strict=True)
        ]
    )


@torch.library.register_fake("fastattn::draw_seed")
def _fake_draw_seed(fresh: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")
