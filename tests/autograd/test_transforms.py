"""Nestings of torch.func's grad, vjp, jacrev and vmap: the derivatives that plain eager attention has."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp, vmap

from fastattn import attention, attention_varlen

from .. import eager

pytestmark = [pytest.mark.needs_dtype(torch.float64), pytest.mark.filterwarnings("ignore:There is a performance drop")]

Function = Callable[[Tensor], Tensor]


def few(y: Tensor) -> Tensor:
    """Two numbers that depend on all of y, for jacobians that stay small."""
    weights = torch.arange(2 * y.numel(), dtype=y.dtype, device=y.device).cos().view(2, -1)
    return weights @ y.flatten()


def by_vjp(f: Function) -> Function:
    def pulled(x: Tensor) -> Tensor:
        y, pull = vjp(f, x)
        return pull(y.cos())[0]

    return pulled


# Each makes a function of a tensor from one, so that they nest in any order.
TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "grad": lambda f: grad(lambda x: f(x).sin().sum()),
    "vjp": by_vjp,
    "jacrev": lambda f: jacrev(lambda x: few(f(x))),
    "vmap": lambda f: lambda x: vmap(f)(torch.stack((x, x.sin()))),
}
NESTINGS = [names for depth in (1, 2, 3) for names in itertools.product(TRANSFORMS, repeat=depth)]

B, H, HKV, SQ, SK, D, DV = 2, 2, 1, 3, 4, 2, 3
QKV = {"q": (B, H, SQ, D), "k": (B, HKV, SK, D), "v": (B, HKV, SK, DV)}
PACKED = {"q": (5, H, D), "k": (6, HKV, D), "v": (6, HKV, DV)}
CU_Q, CU_K = [0, 2, 4], [0, 3, 6]
# shapes of the tensors that are differentiated, options
CASES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "plain": (QKV, {}),
    "bias, sinks": ({**QKV, "bias": (B, 1, SQ, SK), "sinks": (H,)}, {"causal": True}),
    "softcap, rows without keys": (
        {**QKV, "bias": (SK,)},
        {"softcap": 1.5, "window": (1, 0), "kv_lengths": torch.tensor([4, 2], dtype=torch.int32)},
    ),
    "dropout, sinks": ({**QKV, "sinks": (H,)}, {"dropout_p": 0.3, "seed": 5}),
    "packed": ({**PACKED, "bias": (B, 1, 2, 3)}, {"causal": True, "softcap": 2.0}),
}


def of_one_tensor(run: Callable[..., Any], shapes: dict[str, tuple[int, ...]]) -> tuple[Function, int]:
    """`run`, out and lse, as a function of all numbers of its tensors in a row; and how many these are."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]

    def function(x: Tensor) -> Tensor:
        parts = zip(shapes.items(), x.split(sizes), strict=True)
        out, lse = run(**{name: part.view(shape) for (name, shape), part in parts})
        return torch.cat((out.flatten(), lse.masked_fill(lse == -torch.inf, 0.0).flatten()))

    return function, sum(sizes)


def both(case: str, backend: str, device: str) -> tuple[Function, Function, Tensor]:
    """Ours, eager's, and where to differentiate them."""
    shapes, options = CASES[case]
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    ours: Callable[..., Any] = attention
    theirs: Callable[..., Any] = eager.dense
    if case == "packed":
        cu = [torch.tensor(ends, dtype=torch.int32, device=device) for ends in (CU_Q, CU_K)]
        ours = lambda q, k, v, **rest: attention_varlen(q, k, v, *cu, **rest)  # noqa: E731
        theirs = lambda q, k, v, **rest: eager.varlen(q, k, v, CU_Q, CU_K, **rest)  # noqa: E731
    found, size = of_one_tensor(lambda **x: ours(**x, **options, return_lse=True, backend=backend), shapes)
    want, _ = of_one_tensor(lambda **x: theirs(**x, **options), shapes)
    return found, want, torch.randn(size, dtype=torch.float64, device=device)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("nesting", NESTINGS, ids="-".join)
def test_nestings(nesting: tuple[str, ...], case: str, backend: str, device: str) -> None:
    found, want, x = both(case, backend, device)
    for name in reversed(nesting):
        found, want = TRANSFORMS[name](found), TRANSFORMS[name](want)
    torch.testing.assert_close(found(x), want(x), rtol=1e-9, atol=1e-9)
