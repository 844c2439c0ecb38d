"""Gradients of q, k, v, bias and sinks, through out and through lse, against float64; second derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastattn

from . import cases
from .cases import ALL_TOGETHER, Case, build, expected
from .tolerance import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    call = build(case, dtype, device)
    want = expected(case, dtype)
    leaves = call.requires_grad()
    out, lse = call.run(return_lse=True, backend=backend)
    torch.autograd.backward((out, lse), (want.dout.to(device), want.dlse.to(device)))
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.dtype == leaf.dtype, name
        term = want.exact.terms.get(name, 0.0)
        assert_close(f"d{name}", leaf.grad, want.exact.grads[name], want.eager_grads[name], dtype, largest_term=term)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", [*cases.FEATURES, *cases.COMBINATIONS, *cases.NOTHING_SEEN], ids=str)
def test_features(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    check(case, dtype, backend, device)


@pytest.mark.parametrize("case", [*cases.PAIRS, *cases.HEADS, *cases.EMPTY, *cases.LAYOUT_CASES], ids=str)
def test_combinations_and_layouts(case: Case, backend: str, device: str) -> None:
    check(case, torch.float32, backend, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*cases.SIZES, *cases.HEAD_DIMS], ids=str)
def test_sizes(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    check(case, dtype, backend, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", cases.ALIKE, ids=str)
def test_what_keys_have_in_common_cancels(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    """It does not where delta is made of an out that was rounded."""
    check(case, dtype, backend, device)


# ------------------------------------------------------------------------------------------------- parts of the whole

EVERYTHING = cases.COMBINATIONS[1]
LONG_VARLEN = pytest.param(cases.VARLEN[-1], marks=pytest.mark.many_programs)
LONG = Case("long", seqlen_q=257, seqlen_k=300, head_dim=64, head_dim_v=64, causal=True, bias="11qk", heads_q=4)


@pytest.mark.parametrize("case", [EVERYTHING, cases.VARLEN[-1]], ids=str)
@pytest.mark.parametrize("through", ["out", "lse"])
@pytest.mark.needs_dtype(torch.float64)
def test_through_one_output_alone(case: Case, through: str, backend: str, device: str) -> None:
    """The gradient through both outputs is the sum of those through each."""
    call = build(case, torch.float64, device)
    want = expected(case, torch.float64)
    leaves = list(call.requires_grad().values())
    out, lse = call.run(return_lse=True, backend=backend)
    dout, dlse = want.dout.to(device), want.dlse.to(device)
    zero = {"out": (dout, torch.zeros_like(dlse)), "lse": (torch.zeros_like(dout), dlse)}[through]
    output, cotangent = {"out": (out, dout), "lse": (lse, dlse)}[through]
    alone = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
    with_zeros = torch.autograd.grad((out, lse), leaves, zero, retain_graph=True)
    for a, b in zip(alone, with_zeros, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert alone[2].abs().max() == 0 if through == "lse" else alone[2].abs().max() > 0  # lse does not depend on v
    both = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    other = {"out": (lse, dlse), "lse": (out, dout)}[through]
    rest = torch.autograd.grad(call.run(return_lse=True, backend=backend)[through == "out"], leaves, other[1])
    for total, a, b in zip(both, alone, rest, strict=True):
        torch.testing.assert_close(total, a + b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [EVERYTHING, LONG_VARLEN], ids=str)
@pytest.mark.parametrize(
    "wanted",
    [
        *(pytest.param(name, marks=pytest.mark.many_programs) for name in ("q", "k", "v", "bias", "sinks")),
        *("q k", "bias sinks", "k v bias"),
    ],
)
def test_subsets_of_gradients(case: Case, wanted: str, backend: str, device: str) -> None:
    """Asking for some gradients gives the same bits as asking for all, and computes no others."""
    full, part = build(case, torch.float32, device), build(case, torch.float32, device)
    full.requires_grad()
    names = wanted.split()
    for name in names:
        part.leaves[name].requires_grad_()
    for call in (full, part):
        out, lse = call.run(return_lse=True, backend=backend)
        (out.sin().sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()).backward()
    for name, leaf in part.leaves.items():
        if name in names:
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, full.leaves[name].grad)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing_stop_every_gradient(sinks: bool, dtype: torch.dtype, backend: str, device: str) -> None:
    """Even a cotangent that is NaN, as lse = -inf easily makes upstream, goes no further; but lse may be a sink."""
    call = build(Case("hidden", mask="qk", hidden_rows=(4, 9), sinks=sinks, bias="qk"), dtype, device)
    leaves = call.requires_grad()
    out, lse = call.run(return_lse=True, backend=backend)
    hidden = torch.zeros(37, dtype=torch.bool, device=device).index_fill(0, torch.tensor([4, 9], device=device), True)
    clean = torch.randn_like(out), torch.randn_like(lse)
    dirty = clean[0].masked_fill(hidden[:, None], torch.nan), clean[1].masked_fill(hidden, torch.nan)
    want = torch.autograd.grad((out, lse), list(leaves.values()), clean, retain_graph=True)
    found = torch.autograd.grad((out, lse), list(leaves.values()), dirty)
    for name, a, b in zip(leaves, found, want, strict=True):
        assert torch.equal(a, b) if name != "sinks" else a.isnan().all(), name
    assert found[0][:, :, hidden].abs().max() == 0
    assert found[3][hidden].abs().max() == 0


@pytest.mark.needs_dtype(torch.float64)
def test_one_tensor_as_query_key_and_value(backend: str, device: str) -> None:
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64, device=device, requires_grad=True)
    parts = [x.detach().clone().requires_grad_() for _ in range(3)]
    fastattn.attention(x, x, x, causal=True, backend=backend).sin().sum().backward()
    fastattn.attention(*parts, causal=True, backend=backend).sin().sum().backward()
    torch.testing.assert_close(x.grad, sum(part.grad for part in parts))


@pytest.mark.parametrize(
    "case", [EVERYTHING, LONG_VARLEN, pytest.param(LONG, marks=pytest.mark.many_programs)], ids=str
)
def test_bitwise_reproducible(case: Case, backend: str, device: str) -> None:
    """The same bits from run to run, and for any number of threads."""

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        call = build(case, torch.float32, device)
        leaves = call.requires_grad()
        out, lse = call.run(return_lse=True, backend=backend)
        cotangents = want.dout.to(device), want.dlse.to(device)
        return [out, lse, *torch.autograd.grad((out, lse), list(leaves.values()), cotangents)]

    want = expected(case, torch.float32)
    before = torch.get_num_threads()
    try:
        first, *others = [run(threads) for threads in (1, 1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# ------------------------------------------------------------------------------------------------- numerical checks

_TINY = {"batch": 2, "heads_q": 2, "heads_kv": 1, "seqlen_q": 3, "seqlen_k": 5, "head_dim": 3, "head_dim_v": 2}
_OPTIONS = ALL_TOGETHER | {"kv_lengths": (5, 2), "hidden_rows": (1,), "window": (3, 1), "causal": False}
_TINY_DENSE = Case("tiny", **_OPTIONS | _TINY)
_TINY_VARLEN = Case(
    "tiny varlen",
    lengths=((2, 3), (3, 2), (0, 1)),
    **_OPTIONS | _TINY | {"kv_lengths": (3, 2, 1), "q_offset": (1, -1, 0)},
)
TINY = (_TINY_DENSE, _TINY_VARLEN)


def as_function(case: Case, backend: str | None, device: str) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """(out, lse) as a function of everything that has a gradient; lse = -inf is left out, as a check needs numbers."""
    call = build(case, torch.float64, device)
    names = list(call.leaves)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        qkv = (given.pop("q"), given.pop("k"), given.pop("v"))
        attention = fastattn.attention if call.cu_seqlens is None else fastattn.attention_varlen
        options = {**call.options, **given}
        out, lse = attention(*qkv, *(call.cu_seqlens or ()), return_lse=True, backend=backend, **options)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    return function, [leaf.requires_grad_() for leaf in call.leaves.values()]


@pytest.mark.parametrize("case", TINY, ids=str)
@pytest.mark.needs_dtype(torch.float64)
def test_gradcheck(case: Case, backend: str, device: str) -> None:
    assert gradcheck(*as_function(case, backend, device))


@pytest.mark.parametrize("case", TINY, ids=str)
@pytest.mark.needs_dtype(torch.float64)
def test_gradgradcheck(case: Case, backend: str, device: str) -> None:
    assert gradgradcheck(*as_function(case, backend, device))


@pytest.mark.parametrize("through", [0, 1])
@pytest.mark.needs_dtype(torch.float64)
def test_gradgradcheck_through_one_output(through: int, backend: str, device: str) -> None:
    function, leaves = as_function(_TINY_DENSE, backend, device)
    # lse does not depend on v, which gradgradcheck must know.
    names = ("q", "k", "v", "bias", "sinks")
    kept = [i for i, name in enumerate(names) if not (through == 1 and name == "v")]

    def one(*given: Tensor) -> Tensor:
        tensors = list(leaves)
        for i, x in zip(kept, given, strict=True):
            tensors[i] = x
        return function(*tensors)[through]

    assert gradgradcheck(one, [leaves[i] for i in kept])


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "sinks"])
@pytest.mark.needs_dtype(torch.float64)
def test_gradgradcheck_of_one_input(wanted: str, backend: str, device: str) -> None:
    call = build(_TINY_DENSE, torch.float64, device)
    function, leaves = as_function(_TINY_DENSE, backend, device)
    position = list(call.leaves).index(wanted)
    fixed = [leaf.detach() for leaf in leaves]

    def one(x: Tensor) -> Tensor:
        return function(*fixed[:position], x, *fixed[position + 1 :])[0]

    # out is linear in v: its second derivative is nowhere, and asking for it must still work.
    assert gradgradcheck(one, leaves[position])


@pytest.mark.needs_dtype(torch.float64)
def test_gradgradcheck_of_inputs_made_from_one_another(backend: str, device: str) -> None:
    """Second derivatives follow each argument by itself, whatever the others were computed from."""
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)

    def same(x: Tensor) -> Tensor:
        return fastattn.attention(x, x, x, causal=True, backend=backend)

    def chained(x: Tensor) -> Tensor:
        q = 1.5 * x
        k = q.sin()
        return fastattn.attention(q, k, k * q, causal=True, bias=q @ k.transpose(-2, -1), backend=backend)

    assert gradgradcheck(same, x)
    assert gradgradcheck(chained, x)


@pytest.mark.needs_dtype(torch.float64)
def test_third_derivative(backend: str, device: str) -> None:
    q, k, v = torch.randn(3, 1, 1, 2, 3, dtype=torch.float64, device=device).requires_grad_().unbind()

    def third(attention: Callable[..., Tensor]) -> Tensor:
        result = attention(q, k, v, softcap=2.0).sin().sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(result, q, create_graph=True)
            result = grad.sin().sum()
        return grad

    found = third(lambda *args, **options: fastattn.attention(*args, backend=backend, **options))
    torch.testing.assert_close(found, third(fastattn.reference.attention))
