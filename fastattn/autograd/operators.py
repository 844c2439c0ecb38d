"""The operators `torch.ops.fastattn.*`: what torch.compile, export and other tracers see of fastattn.

Each is registered once, by schema, with the function that runs it and the fake kernel that tells tracers the shapes
and strides of its results. The same functions are called directly where nothing traces (see `fastattn.autograd`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Needs, Results, empty_grad, empty_results
from ..backends.dispatch import choose
from ..philox import draw_seed
from ..problem import Inputs, check_results, describe
from ..problem.arguments import schema
from .call import LEADING, SEED, Call, kind_of, unflatten, unflatten_cache

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


# ----------------------------------------------------------------------------------------- what runs on real tensors


def run_forward(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (out, lse, residual)."""
    problem, backend = call.plan(inputs)
    return filled(backend.forward(problem, inputs, call.for_backward))


def run_backward(leading: Sequence[Any], inputs: Inputs, call: Call, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Computes the gradients of q, k, v, bias and sinks; leading: the tensors of `call.LEADING`."""
    problem, backend = call.plan(inputs)
    dout, dlse, out, lse, residual = leading
    known = Results(out, lse, None if is_none(residual) else residual)
    check_results(problem, inputs, *known)
    grads = backend.backward(problem, inputs, known, dout, dlse, Needs(*needs))
    return tuple([dout.new_empty(0) if grad is None else grad for grad in grads])


def filled(results: Results) -> tuple[Tensor, Tensor, Tensor]:
    """The results as the operators pass them on."""
    out, lse, residual = results
    return out, lse, out.new_empty(0) if residual is None else residual


def is_none(x: Tensor) -> bool:
    """Whether it stands for a missing result."""
    return x.ndim == 1 and x.shape[0] == 0


def run_cache(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """Writes the new keys and values into the cache and computes (out, lse)."""
    problem, backend = call.plan(inputs, "cache")
    return backend.decode(problem, inputs)


def run_draw_seed(fresh: Tensor) -> Tensor:
    """Draws a seed; `fresh` is not read."""
    return draw_seed()


def _forward(*args: Any) -> tuple[Tensor, ...]:
    return *run_forward(*unflatten(args, args[-1])), _copy_seed(args)


def _copy_seed(args: tuple[Any, ...]) -> Tensor:
    seed = args[SEED]
    return args[0].new_empty(0) if seed is None else seed.clone()


def _backward(*args: Any) -> tuple[Tensor, ...]:
    return run_backward(args[: len(LEADING)], *unflatten(args[len(LEADING) :]), args[-1])


for _name, _run in (
    ("forward", _forward),
    ("backward", _backward),
    ("cache", lambda *args: run_cache(*unflatten_cache(args))),
    ("draw_seed", run_draw_seed),
):
    torch.library.impl(f"fastattn::{_name}", "CompositeExplicitAutograd")(_run)


# ------------------------------------------------------------------------------------------ what tracers see of them


def _outputs(kind: str, inputs: Inputs, call: Call) -> Results:
    problem = describe(kind, inputs, call.options, cached=False)
    if call.backend is not None:
        choose(problem, call.backend)  # an impossible choice is refused while tracing, not when the program runs
    return empty_results(problem, inputs.q, call.for_backward)


@torch.library.register_fake("fastattn::forward")
def fake_forward(*args: Any) -> tuple[Tensor, ...]:
    """Results of the right shapes and strides for tensors of any kind."""
    inputs, call = unflatten(args, args[-1])
    return *filled(_outputs(kind_of(inputs), inputs, call)), _copy_seed(args)


@torch.library.register_fake("fastattn::cache")
def fake_cache(*args: Any) -> tuple[Tensor, Tensor]:
    """Likewise."""
    return _outputs("cache", *unflatten_cache(args))[:2]


@torch.library.register_fake("fastattn::backward")
def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    inputs, _ = unflatten(args[len(LEADING) :])
    return tuple(
        [
            empty_grad(x) if need and x is not None else args[0].new_empty(0)
            for x, need in zip(inputs.differentiable, args[-1], strict=True)
        ]
    )


@torch.library.register_fake("fastattn::draw_seed")
def _fake_draw_seed(fresh: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")
