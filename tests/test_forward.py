"""out and lse of every dense case, on every backend, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastattn
from fastattn import reference

from . import cases
from .cases import Case, build, expected
from .tolerance import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    call = build(case, dtype, device)
    out, lse = call.run(return_lse=True, backend=backend)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = expected(case, dtype)
    assert_close("out", out, want.exact.out, want.eager_out, dtype)
    assert_close("lse", lse, want.exact.lse, want.eager_lse, lse.dtype)


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


@pytest.mark.parametrize("case", [*cases.COMBINATIONS, *cases.VARLEN[-1:]], ids=str)
def test_automatic_choice(case: Case) -> None:
    out, lse = build(case).run(return_lse=True)
    want = expected(case, torch.float32)
    assert_close("out", out, want.exact.out, want.eager_out, torch.float32)
    assert_close("lse", lse, want.exact.lse, want.eager_lse, torch.float32)
    assert torch.equal(build(case).run(), out)


@pytest.mark.parametrize("case", [*cases.COMBINATIONS, *cases.EMPTY], ids=str)
def test_reference_functions(case: Case) -> None:
    call = build(case, torch.float64)
    out, lse = reference.attention(call.q, call.k, call.v, return_lse=True, **call.options)
    want = expected(case, torch.float64)
    assert_close("out", out, want.exact.out, want.eager_out, torch.float64)
    assert_close("lse", lse, want.exact.lse, want.eager_lse, torch.float64)
    assert torch.equal(reference.attention(call.q, call.k, call.v, **call.options), out)
    weights = reference.attention_weights(call.q, call.k, **call.options)
    assert_close("weights", weights, want.exact.weights, None, torch.float64)


# --------------------------------------------------------------------------------------------------- meaning, by hand

PICTURES = (
    ({}, "xxxxx xxxxx xxxxx"),
    ({"causal": True}, "xxx.. xxxx. xxxxx"),
    ({"causal": True, "causal_alignment": "top-left"}, "x.... xx... xxx.."),
    ({"window": (1, 0)}, ".xx.. ..xx. ...xx"),
    ({"window": (1, 0), "causal_alignment": "top-left"}, "x.... xx... .xx.."),
    ({"window": (None, 1)}, "xxxx. xxxxx xxxxx"),
    ({"window": (1, None)}, ".xxxx ..xxx ...xx"),
    ({"window": (0, 2), "causal": True}, "..x.. ...x. ....x"),
    ({"kv_lengths": (2,), "causal": True}, "..... x.... xx..."),
    ({"kv_lengths": (2,), "causal": True, "causal_alignment": "top-left"}, "x.... xx... xx..."),
    ({"kv_lengths": (4,)}, "xxxx. xxxx. xxxx."),
    ({"mask": torch.tensor([True, False, True, True, False])}, "x.xx. x.xx. x.xx."),
)


@pytest.mark.parametrize(("options", "picture"), PICTURES, ids=str)
def test_pictures(options: dict[str, Any], picture: str, backend: str, device: str) -> None:
    """Which of 5 keys each of 3 queries sees: with equal scores and the identity as values, out shows it."""
    rows = picture.split()
    if "kv_lengths" in options:
        options = {**options, "kv_lengths": torch.tensor(options["kv_lengths"], dtype=torch.int32, device=device)}
    if "mask" in options:
        options = {**options, "mask": options["mask"].to(device)}
    q, k = torch.zeros(1, 1, 3, 4, device=device), torch.zeros(1, 1, 5, 4, device=device)
    out = fastattn.attention(q, k, torch.eye(5, device=device)[None, None], backend=backend, **options)
    want = torch.tensor([[1.0 / max(row.count("x"), 1) if key == "x" else 0.0 for key in row] for row in rows])
    torch.testing.assert_close(out[0, 0].cpu(), want)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_layouts_of_mask_and_bias(dtype: torch.dtype, backend: str, device: str) -> None:
    """Keys that do not lie side by side, and rows at odd addresses, give the same bits."""
    q, k, v = torch.randn(3, 1, 2, 37, 16, device=device, dtype=torch.float32).to(dtype).unbind()
    mask, bias = torch.rand(37, 37, device=device) < 0.7, torch.randn(37, 37, device=device).to(dtype)
    want = fastattn.attention(q, k, v, mask=mask, bias=bias, backend=backend)
    for change in (lambda x: x.t().contiguous().t(), cases.scattered):
        found = fastattn.attention(q, k, v, mask=change(mask), bias=change(bias), backend=backend)
        assert torch.equal(found, want)


@pytest.mark.parametrize("bias", [-1e36, 1e36])
def test_enormous_bias(bias: float, backend: str, device: str) -> None:
    """Keys that all have it are weighed as without it."""
    q = torch.zeros(1, 1, 3, 64, device=device)
    v = torch.randn(1, 1, 40, 64, device=device)
    for scale in (1e-6, None, 100.0):
        given = torch.full((3, 40), bias, device=device)
        found = fastattn.attention(q, torch.ones_like(v), v, bias=given, scale=scale, backend=backend)
        torch.testing.assert_close(found, v.mean(2, keepdim=True).expand(1, 1, 3, 64))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.many_programs
def test_one_key_gives_its_value(dim: int, backend: str, device: str) -> None:
    """Also for more sequences, or heads, than some machines have room for in one dimension of a launch."""
    q, v = (torch.randn(70_000, 1, 1, size, device=device).transpose(0, dim) for size in (2, 3))
    torch.testing.assert_close(fastattn.attention(q, q, v, backend=backend), v)


def test_lazily_negated_tensors(backend: str, device: str) -> None:
    """The imaginary part of a conjugate is a view whose memory holds the opposite sign."""
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.complex64, device=device).conj().imag
    assert q.is_neg()
    want = fastattn.attention(q.resolve_neg(), k.resolve_neg(), v.resolve_neg(), backend=backend)
    torch.testing.assert_close(fastattn.attention(q, k, v, backend=backend), want)


# ------------------------------------------------------------------------------------------------ layout of the output


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)], ids=str)
def test_out_has_the_order_of_q(order: tuple[int, ...], backend: str, device: str) -> None:
    sizes = (2, 3, 5)
    q = torch.randn(*(sizes[d] for d in order), 8, device=device).permute(*(order.index(d) for d in range(3)), 3)
    kv = torch.randn(2, 3, 6, 8, device=device)
    out, lse = fastattn.attention(q, kv, kv[..., :4], return_lse=True, backend=backend)
    assert out.shape == (*sizes, 4)
    assert out.permute(*order, 3).is_contiguous()
    assert lse.is_contiguous()


def test_out_puts_head_dim_innermost(backend: str, device: str) -> None:
    q = torch.randn(2, 3, 8, 5, device=device).transpose(2, 3)
    assert fastattn.attention(q, q, q, backend=backend).is_contiguous()


def test_heads_merge_without_a_copy(backend: str, device: str) -> None:
    q, k, v = torch.randn(2, 5, 3, 4, 8, device=device).unbind(2)
    out = fastattn.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), backend=backend)
    assert out.transpose(1, 2).view(2, 5, 32).data_ptr() == out.data_ptr()


def test_inputs_are_not_changed(backend: str, device: str) -> None:
    call = build(cases.COMBINATIONS[0], torch.float32, device)
    tensors = [call.q, call.k, call.v, *(x for x in call.options.values() if isinstance(x, torch.Tensor))]
    before = [x.clone() for x in tensors]
    leaves = call.requires_grad()
    call.run(backend=backend).sum().backward()
    assert all(torch.equal(x.detach(), y) for x, y in zip(tensors, before, strict=True))
    assert all(leaf.grad is not None for leaf in leaves.values())
