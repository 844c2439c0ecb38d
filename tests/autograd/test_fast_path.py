"""The short way of plain calls: taken when it should be, and the same as the ordinary way, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.autograd import fast_path

SHAPES = {"square": (2, 4, 4, 5, 5, 8, 8), "grouped": (2, 6, 2, 3, 7, 16, 5), "empty": (2, 2, 2, 0, 4, 8, 8)}


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v = shape
    q = torch.randn(batch, seqlen_q, heads_q, head_dim, dtype=dtype).transpose(1, 2)
    k = torch.randn(batch, heads_kv, seqlen_k, head_dim, dtype=dtype)
    v = torch.randn(batch, heads_kv, seqlen_k, head_dim_v, dtype=dtype)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def ordinary(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same call on the way of all calls that have a seed."""
    return fastattn.attention(q, k, v, causal=True, seed=1, backend="cpu")


def short(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = fast_path.attend(q, k, v, True, None, "bottom-right", None, None, "cpu")
    assert out is not None
    return out


def took_the_short_way(out: Tensor) -> bool:
    return out.grad_fn is not None and out.grad_fn.call.prepared is not None


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("needs", [n for n in itertools.product((True, False), repeat=3) if any(n)], ids=str)
def test_gradients_are_those_of_the_ordinary_way(shape: tuple[int, ...], needs: tuple[bool, bool, bool]) -> None:
    tensors = [x.detach().requires_grad_(need) for x, need in zip(make(shape), needs, strict=True)]
    wanted = [x for x in tensors if x.requires_grad]
    dout = torch.randn_like(ordinary(*tensors))
    expected = torch.autograd.grad(ordinary(*tensors), wanted, dout)
    for _ in range(2):  # the first call prepares, the second uses what was prepared
        out = fastattn.attention(*tensors, causal=True, backend="cpu")
        assert took_the_short_way(out)
        found = torch.autograd.grad(out, wanted, dout)
        for a, b, x in zip(found, expected, wanted, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
            assert a.dtype == x.dtype


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.mT.contiguous().mT,
        lambda g: g[:1, :1, :1, :1].expand_as(g),
        lambda g: torch._neg_view(-g),
        lambda g: g.repeat_interleave(2, -1)[..., ::2],
    ],
    ids=["transposed", "expanded", "negated", "strided"],
)
def test_output_gradients_may_lie_anyhow(change: Callable[[Tensor], Tensor]) -> None:
    q, k, v = make(SHAPES["square"])
    out = short(q, k, v)
    first = torch.autograd.grad(out, (q, k, v), torch.randn_like(out), retain_graph=True)
    assert all(g.isfinite().all() for g in first)
    dout = change(torch.randn_like(out))
    found = torch.autograd.grad(out, (q, k, v), dout)
    expected = torch.autograd.grad(ordinary(q, k, v), (q, k, v), dout.resolve_neg().contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_saved_tensors_may_come_back_in_another_layout() -> None:
    q, k, v = make(SHAPES["square"])
    dout = torch.randn(2, 4, 5, 8)
    expected = torch.autograd.grad(ordinary(q, k, v), (q, k, v), dout)
    for unpack in (lambda x: x.mT.contiguous().mT, lambda x: torch._neg_view(-x)):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            out = short(q, k, v)
        found = torch.autograd.grad(out, (q, k, v), dout)
        torch.testing.assert_close(found, expected)  # products of few queries are summed up as rows lie


def test_gradients_can_be_differentiated_again() -> None:
    q, k, v = make(SHAPES["grouped"], torch.float64)
    assert took_the_short_way(short(q, k, v))
    assert torch.autograd.gradcheck(short, (q, k, v))
    assert torch.autograd.gradgradcheck(short, (q, k, v))


def test_changing_an_input_before_the_backward_is_noticed() -> None:
    q, k, v = make(SHAPES["square"])
    out = short(q * 1, k, v)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_without_gradient_nothing_is_recorded() -> None:
    q, k, v = make(SHAPES["square"])
    with torch.no_grad():
        assert not short(q, k, v).requires_grad
        assert torch.equal(short(q.detach(), k.detach(), v.detach()), ordinary(q, k, v))


def test_options_of_a_wrong_type_are_refused_after_a_call_that_equals_theirs() -> None:
    x = torch.randn(1, 1, 1, 64)
    assert torch.equal(short(x, x, x), fastattn.attention(x, x, x, backend="reference"))
    fastattn.attention(x, x, x)
    with pytest.raises(TypeError, match="causal must be a bool"):
        fastattn.attention(x, x, x, causal=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scale"):
        fastattn.attention(x, x, x, scale=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tracing_follows_the_inputs(dtype: torch.dtype) -> None:
    q, k, v = make(SHAPES["square"], dtype)
    for needs in (True, False):
        inputs = tuple(x.detach().requires_grad_(needs) for x in (q, k, v))
        traced = torch.jit.trace(lambda *x: fastattn.attention(*x), inputs)
        other = tuple(torch.randn_like(x).requires_grad_() for x in inputs)  # a trace is made for a backward pass
        assert torch.equal(traced(*other), fastattn.attention(*other))


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 2.0**-12)], ids=str)
def test_a_hook_may_not_spoil_what_rounding_took(dtype: torch.dtype, size: float) -> None:
    q, k, v = make(SHAPES["square"], dtype)
    q = (q.detach() * 0.0).requires_grad_()  # so that probabilities are not rounded, as AVX-512 does in bfloat16
    v = (v.detach() * size).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x[:1] if x is low else x):
        out = short(q, k, v)
    *_, low = kept
    assert low.shape == out.shape
    exact = fastattn.attention(q.double(), k.double(), v.double(), causal=True)
    assert (out.double() + low.double() / 256 - exact).abs().max() < (out - exact).abs().max() / 64
    with pytest.raises(ValueError, match="residual of the forward pass must come back with shape"):
        out.sum().backward()


@pytest.mark.parametrize("change", [lambda x: x.bfloat16(), lambda x: x[:, :1]], ids=["dtype", "shape"])
def test_results_that_a_hook_spoils_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    q, k, v = make(SHAPES["square"])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: change(x) if x.ndim == 3 else x, lambda x: x):
        out = short(q, k, v)
    with pytest.raises(ValueError, match="lse of the forward pass must come back with shape"):
        out.sum().backward()
