"""torch.func.vmap over problems, alone and with gradients: the results of a loop, in one call where that can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn.nn as fnn
from fastattn import attention, attention_varlen, scaled_dot_product_attention
from fastattn.autograd import operators

pytestmark = pytest.mark.filterwarnings("error")  # a missing batching rule is a warning of torch's

N, B, H, HKV, SQ, SK, D = 3, 2, 4, 2, 5, 7, 8


def qkv(*lead: int) -> list[Tensor]:
    shapes = (*lead, B, H, SQ, D), (*lead, B, HKV, SK, D), (*lead, B, HKV, SK, D)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def loop(function: Callable[..., Any], in_dims: tuple[int | None, ...], *args: Any) -> Any:
    rows = [
        function(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
        for i in range(N)
    ]
    return tuple(map(torch.stack, zip(*rows, strict=True))) if isinstance(rows[0], tuple) else torch.stack(rows)


def boolean(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.7


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# name of an argument of attention -> tensors for it, each with the dimension to go over
EXTRAS: dict[str, tuple[str, Tensor, int | None]] = {
    "mask": ("mask", boolean(N, B, H, SQ, SK), 0),
    "mask, two dimensions": ("mask", boolean(SQ, N, SK), 1),
    "mask, one for all problems": ("mask", boolean(SQ, SK), None),
    "mask, one per batch": ("mask", boolean(B, 1, SQ, SK), None),
    "bias": ("bias", floats(B, H, SQ, SK, N), 4),
    "bias, one batch": ("bias", floats(N, 1, H, SQ, SK), 0),
    "bias, of keys": ("bias", floats(N, SK), 0),
    "bias, number": ("bias", floats(N), 0),
    "bias, one for all problems": ("bias", floats(H, SQ, SK), None),
    "bias, one per batch": ("bias", floats(B, 1, SQ, SK), None),
    "alibi": ("alibi_slopes", floats(N, H).abs(), 0),
    "alibi, batch": ("alibi_slopes", floats(B, N, H).abs(), 1),
    "alibi, one for all problems": ("alibi_slopes", floats(H).abs(), None),
    "alibi, one per batch": ("alibi_slopes", floats(B, H).abs(), None),
    "lengths": ("kv_lengths", torch.tensor([[7, 3], [0, 5], [6, 6]], dtype=torch.int32), 0),
    "offsets": ("q_offset", torch.tensor([[3, -1], [0, 5], [6, 2]], dtype=torch.int32), 0),
    "offsets, one for all problems": ("q_offset", torch.tensor([3, -1], dtype=torch.int32), None),
    "lengths, one for all problems": ("kv_lengths", torch.tensor([7, 3], dtype=torch.int32), None),
    "sinks": ("sinks", floats(N, H), 0),
    "sinks, one for all problems": ("sinks", floats(H), None),
}
OPTIONS = {"causal": True, "window": (4, 0), "softcap": 3.0, "return_lse": True}


def with_extra(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    argument = EXTRAS[name][0]
    return lambda q, k, v, extra: attention(q, k, v, **OPTIONS, **{argument: extra})


@pytest.mark.parametrize("name", EXTRAS)
def test_every_option(name: str) -> None:
    _, extra, dim = EXTRAS[name]
    args, in_dims = (*qkv(N), extra), (0, 0, 0, dim)
    found = vmap(with_extra(name), in_dims)(*args)
    torch.testing.assert_close(found, loop(with_extra(name), in_dims, *args))


@pytest.mark.parametrize("name", EXTRAS)
def test_every_gradient(name: str) -> None:
    """Per-problem gradients, of what all problems share too: vmap(grad(f)), and grad of a sum over vmap(f)."""
    argument, extra, dim = EXTRAS[name]
    args, in_dims = (*qkv(N), extra), (0, 0, 0, dim)
    wanted = (0, 1, 2, 3) if argument in ("bias", "sinks") else (0, 1, 2)

    def loss(*args: Tensor) -> Tensor:
        out, lse = with_extra(name)(*args)
        return out.sin().sum() + lse.masked_fill(lse == -torch.inf, 0.0).cos().sum()

    each = grad(loss, wanted)
    want = loop(each, in_dims, *args)
    torch.testing.assert_close(vmap(each, in_dims)(*args), want)
    found = grad(lambda *args: vmap(loss, in_dims)(*args).sum(), wanted)(*args)
    for i, gradient in zip(wanted, found, strict=True):
        total = want[i].sum(0) if in_dims[i] is None else want[i].movedim(0, in_dims[i])
        torch.testing.assert_close(gradient, total)


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, 0), (2, 0, 1), (None, None, 0), (4, 4, 4)], ids=str)
def test_dimensions(in_dims: tuple[int | None, ...]) -> None:
    args = [x if dim is None else torch.stack((x, 2 * x, -x), dim) for x, dim in zip(qkv(), in_dims, strict=True)]
    found = vmap(attention, in_dims)(*args)
    torch.testing.assert_close(found, loop(attention, in_dims, *args))
    gradient = grad(lambda q, k, v: attention(q, k, v).square().sum(), (0, 1, 2))
    torch.testing.assert_close(vmap(gradient, in_dims)(*args), loop(gradient, in_dims, *args))


def test_gradients_in_half_precision() -> None:
    """What rounding takes from out is kept for them in each problem."""
    args = [(x + 2).bfloat16() for x in qkv(N)]
    gradient = grad(lambda *x: attention(*x).float().square().sum(), (0, 1, 2))
    torch.testing.assert_close(vmap(gradient)(*args), loop(gradient, (0, 0, 0), *args), rtol=0, atol=0)
    mapped = grad(lambda *x: vmap(attention)(*x).float().square().sum(), (0, 1, 2))
    torch.testing.assert_close(mapped(*args), loop(gradient, (0, 0, 0), *args), rtol=0, atol=0)


def test_it_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    real = operators.run_forward
    monkeypatch.setattr(operators, "run_forward", lambda *args: (calls.append(args[0].q.shape), real(*args))[1])
    vmap(lambda q, k, v: attention(q, k, v, bias=torch.zeros(SQ, SK, dtype=torch.float64)))(*qkv(N))
    vmap(grad(lambda q, k, v: attention(q, k, v).sum()))(*qkv(N))
    assert calls == [(N * B, H, SQ, D)] * 2


def test_operators_in_a_graph() -> None:
    """What a tracer wrote down can be mapped over too."""
    args = qkv(N)
    graph = make_fx(lambda q, k, v: attention(q, k, v, causal=True))(*(x[0] for x in args))
    assert "fastattn.forward.default" in [str(node.target) for node in graph.graph.nodes]
    torch.testing.assert_close(vmap(graph)(*args), torch.stack([graph(*x) for x in zip(*args, strict=True)]))


def test_nested() -> None:
    q, k, v = qkv(2, N)
    found = vmap(vmap(attention), (1, 1, 1))(q, k, v)
    want = torch.stack([torch.stack([attention(q[i, j], k[i, j], v[i, j]) for i in range(2)]) for j in range(N)])
    torch.testing.assert_close(found, want)


def test_second_derivatives() -> None:
    q, k, v = qkv(N)

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return grad(lambda q: grad(lambda q: attention(q, k, v).sin().sum())(q).square().sum())(q)

    torch.testing.assert_close(vmap(twice)(q, k, v), loop(twice, (0, 0, 0), q, k, v))


def test_jacobian_by_vjp() -> None:
    q, k, v = qkv()
    out, pull = vjp(lambda q: attention(q, k, v, causal=True), q)
    cotangents = floats(N, *out.shape)
    torch.testing.assert_close(vmap(pull)(cotangents)[0], torch.stack([pull(c)[0] for c in cotangents]))


def test_packed_sequences() -> None:
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    x = [floats(N, 9, heads, D) for heads in (H, HKV, HKV)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_varlen(q, k, v, cu, cu, causal=True)

    torch.testing.assert_close(vmap(run)(*x), loop(run, (0, 0, 0), *x))
    per_problem = grad(lambda *x: run(*x).square().sum(), (0, 1, 2))
    torch.testing.assert_close(vmap(per_problem)(*x), loop(per_problem, (0, 0, 0), *x))


def test_dropout_with_a_seed_is_the_loops() -> None:
    x = qkv(N)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, dropout_p=0.4, seed=11)

    torch.testing.assert_close(vmap(run)(*x), loop(run, (0, 0, 0), *x))
    per_problem = grad(lambda *x: run(*x).square().sum(), (0, 1, 2))
    torch.testing.assert_close(vmap(per_problem)(*x), loop(per_problem, (0, 0, 0), *x))


def test_dropout_without_a_seed_obeys_randomness() -> None:
    q = torch.zeros(N, B, H, SQ, D)
    v = torch.ones(N, B, H, SQ, D)

    def run(q: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, q, v, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(run)(q, v)
    same, different = (vmap(run, randomness=mode)(q, v) for mode in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


def test_no_problems_at_all() -> None:
    """Also where problems are computed one by one, out and gradients have the shapes of none."""
    q, sinks = torch.randn(0, 1, 2, 5, 8), torch.randn(0, 2)

    def run(q: Tensor, sinks: Tensor) -> Tensor:
        return attention(q, q, q, sinks=sinks, dropout_p=0.2, seed=1)

    assert vmap(run)(q, sinks).shape == q.shape
    dq, dsinks = vmap(grad(lambda *x: run(*x).sum(), (0, 1)))(q, sinks)
    assert (dq.shape, dsinks.shape) == (q.shape, sinks.shape)


def test_errors_name_the_argument() -> None:
    q, k, v = qkv(N)
    with pytest.raises(ValueError, match="mask must be broadcastable"):
        vmap(lambda q, k, v: attention(q, k, v, mask=torch.ones(SQ, SQ, dtype=torch.bool)))(q, k, v)


def test_gradients_per_sample_of_a_module() -> None:
    module = fnn.MultiheadAttention(16, 4, batch_first=True, num_kv_heads=2, window=(3, 0))
    x, parameters = torch.randn(N, 6, 16), dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        batch = x[None]
        return functional_call(module, parameters, (batch, batch, batch), {"need_weights": False})[0].square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(N):
        for name, want in grad(loss)(parameters, x[i]).items():
            torch.testing.assert_close(found[name][i], want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
@pytest.mark.parametrize("order", ["grad", "vmap(grad)", "grad(vmap)"])
def test_transforms_inside_a_compiled_function(order: str) -> None:
    torch._dynamo.reset()
    q, k, v = qkv(N)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, bias=torch.ones(SQ, SK, dtype=torch.float64)).sin().sum()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if order == "grad":
            return grad(loss)(q[0], k[0], v[0])
        if order == "vmap(grad)":
            return vmap(grad(loss))(q, k, v)
        return grad(lambda q: vmap(loss)(q, k, v).sum())(q)

    found = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(found, run(q, k, v))
    torch._dynamo.reset()
