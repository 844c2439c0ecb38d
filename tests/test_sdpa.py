"""fastattn.scaled_dot_product_attention is torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import scaled_dot_product_attention

from .tolerance import assert_close, to_numpy

NORMAL = torch.randn


def boolean(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) < 0.6


# name -> (query, key, value shapes, shape and kind of attn_mask, keywords)
CALLS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[Any, ...] | None, dict[str, Any]]] = {
    "plain": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8), None, {}),
    "causal, square": ((2, 3, 7, 8), (2, 3, 7, 8), (2, 3, 7, 8), None, {"is_causal": True}),
    "causal, more keys": ((2, 3, 5, 8), (2, 3, 9, 8), (2, 3, 9, 8), None, {"is_causal": True}),
    "causal, more queries": ((2, 3, 9, 8), (2, 3, 5, 8), (2, 3, 5, 8), None, {"is_causal": True}),
    "head_dim of value": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 5), None, {}),
    "scale": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8), None, {"scale": 0.7}),
    "bool mask": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8), (boolean, 2, 3, 7, 9), {}),
    "bool mask, 2-D": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8), (boolean, 7, 9), {}),
    "bool mask, padding": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8), (boolean, 2, 1, 1, 9), {}),
    "bool mask, 3-D": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8), (boolean, 3, 7, 9), {}),
    "float mask": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8), (NORMAL, 2, 3, 7, 9), {}),
    "float mask, 2-D": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8), (NORMAL, 7, 9), {}),
    "float mask, heads": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8), (NORMAL, 1, 3, 1, 1), {}),
    "float mask, rows": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8), (NORMAL, 2, 1, 7, 1), {}),
    "2-D": ((7, 8), (9, 8), (9, 5), None, {}),
    "2-D causal": ((7, 8), (9, 8), (9, 5), None, {"is_causal": True}),
    "2-D mask": ((7, 8), (9, 8), (9, 5), (NORMAL, 7, 9), {}),
    "3-D": ((3, 7, 8), (3, 9, 8), (3, 9, 8), None, {}),
    "3-D mask": ((3, 7, 8), (3, 9, 8), (3, 9, 8), (boolean, 3, 7, 9), {}),
    "3-D mask of one row": ((3, 7, 8), (3, 9, 8), (3, 9, 8), (NORMAL, 3, 1, 9), {}),
    "3-D mask, 2-D": ((3, 7, 8), (3, 9, 8), (3, 9, 8), (NORMAL, 7, 9), {}),
    "5-D": ((2, 2, 3, 7, 8), (2, 2, 3, 9, 8), (2, 2, 3, 9, 8), None, {"is_causal": True}),
    "5-D mask": ((2, 2, 3, 7, 8), (2, 2, 3, 9, 8), (2, 2, 3, 9, 8), (NORMAL, 2, 2, 3, 7, 9), {}),
    "5-D mask, 4-D": ((2, 2, 3, 7, 8), (2, 2, 3, 9, 8), (2, 2, 3, 9, 8), (boolean, 2, 1, 7, 9), {}),
    "5-D mask, broadcast": ((2, 2, 3, 7, 8), (2, 2, 3, 9, 8), (2, 2, 3, 9, 8), (NORMAL, 2, 1, 3, 1, 9), {}),
    "6-D": ((2, 1, 2, 3, 7, 8), (2, 1, 2, 3, 9, 8), (2, 1, 2, 3, 9, 8), None, {}),
    "one batch of keys": ((4, 3, 7, 8), (1, 3, 9, 8), (1, 3, 9, 8), None, {}),
    "one head of keys": ((2, 3, 7, 8), (2, 1, 9, 8), (2, 1, 9, 8), None, {}),
    "batch from query and key": ((2, 1, 7, 8), (1, 3, 9, 8), (1, 1, 9, 8), (NORMAL, 2, 3, 7, 9), {}),
    "fewer dimensions in query": ((7, 8), (1, 3, 9, 8), (2, 1, 9, 8), None, {}),
    "fewer dimensions in key": ((2, 3, 7, 8), (3, 9, 8), (9, 8), None, {"is_causal": True}),
    "GQA": ((2, 6, 7, 8), (2, 2, 9, 8), (2, 2, 9, 8), None, {"enable_gqa": True}),
    "GQA causal": ((2, 6, 7, 8), (2, 2, 9, 8), (2, 2, 9, 8), None, {"enable_gqa": True, "is_causal": True}),
    "GQA mask": ((2, 6, 7, 8), (2, 2, 9, 8), (2, 2, 9, 8), (boolean, 2, 6, 7, 9), {"enable_gqa": True}),
    "GQA with equal heads": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8), None, {"enable_gqa": True}),
    "GQA of unequal key and value": ((2, 4, 7, 8), (2, 2, 9, 8), (2, 1, 9, 8), None, {"enable_gqa": True}),
    "GQA 3-D": ((4, 7, 8), (2, 9, 8), (2, 9, 8), None, {"enable_gqa": True}),
    "GQA 5-D": ((2, 3, 4, 7, 8), (2, 3, 2, 9, 8), (2, 3, 2, 9, 8), (NORMAL, 2, 3, 4, 7, 9), {"enable_gqa": True}),
    "no queries": ((2, 3, 0, 8), (2, 3, 9, 8), (2, 3, 9, 8), None, {}),
    "no keys": ((2, 3, 7, 8), (2, 3, 0, 8), (2, 3, 0, 8), None, {}),
    "no batch": ((0, 3, 7, 8), (0, 3, 9, 8), (0, 3, 9, 8), None, {}),
}


def arguments(name: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    *shapes, mask, keywords = CALLS[name]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if mask is not None:
        make, *shape = mask
        tensors.append(make(*shape, dtype=torch.float64) if make is NORMAL else make(*shape))
    return [x.to(dtype) if x.is_floating_point() else x for x in tensors], keywords


def evaluate(function: Callable[..., Tensor], tensors: list[Tensor], keywords: dict[str, Any]) -> list[Tensor]:
    """The output, and the gradients of all floating point arguments."""
    given = [x.clone().requires_grad_(x.is_floating_point()) for x in tensors]
    out = function(*given, **keywords)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    leaves = [x for x in given if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_is_torchs(name: str, dtype: torch.dtype) -> None:
    tensors, keywords = arguments(name, dtype)
    found = evaluate(scaled_dot_product_attention, tensors, keywords)
    wide = [x.double() if x.is_floating_point() else x for x in tensors]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = evaluate(F.scaled_dot_product_attention, wide, keywords)
        yardstick = evaluate(F.scaled_dot_product_attention, tensors, keywords)
    names = ("out", "query", "key", "value", "attn_mask")
    for which, a, want, b in zip(names, found, exact, yardstick, strict=False):
        assert a.dtype == dtype
        # A mask that is the same for a whole row shifts its scores, which changes nothing: its gradient cancels.
        assert_close(which, a, to_numpy(want), b, dtype, largest_term=1.0 if which == "attn_mask" else 0.0)


@pytest.mark.parametrize("make", [torch.zeros, lambda *s, **k: torch.full(s, -torch.inf, **k)], ids=["bool", "float"])
def test_rows_that_see_nothing(make: Callable[..., Tensor]) -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 8).unbind()
    mask = make(5, 5, dtype=torch.bool) if make is torch.zeros else make(5, 5)
    mask[2, 1] = True if make is torch.zeros else 0.0
    found = evaluate(scaled_dot_product_attention, [q, k, v, mask], {})
    assert found[0][:, :, [0, 1, 3, 4]].abs().max() == 0
    torch.testing.assert_close(found[0], F.scaled_dot_product_attention(q, k, v, mask))
    assert all(x.isfinite().all() for x in found)


def test_arguments_may_be_positional() -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 8).unbind()
    mask = torch.randn(5, 5)
    by_name = scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask, dropout_p=0.0, is_causal=False)
    assert torch.equal(scaled_dot_product_attention(q, k, v, mask, 0.0, False), by_name)


def test_dropout() -> None:
    q, k = torch.zeros(2, 4, 30, 8), torch.zeros(2, 4, 40, 8)
    v = torch.eye(40).expand(2, 4, 40, 40)
    torch.manual_seed(0)
    first, second = (scaled_dot_product_attention(q, k, v, dropout_p=0.25) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(scaled_dot_product_attention(q, k, v, dropout_p=0.25), first)
    assert not torch.equal(first, second)
    kept = first > 0
    torch.testing.assert_close(first, kept / (40 * 0.75))
    assert abs(kept.double().mean() - 0.75) < 0.02


def test_autocast() -> None:
    q, k, v, mask = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8).bfloat16(), torch.randn(2, 3, 7, 8), boolean(7, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scaled_dot_product_attention(q, k, v, mask)
        want = F.scaled_dot_product_attention(q, k, v, mask)
    assert found.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2)


X = torch.zeros(2, 3, 5, 8)
KEY = torch.zeros(2, 3, 7, 8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": [1.0]}, TypeError, ["query", "list", "Tensor"]),
        ({"key": None}, TypeError, ["key", "NoneType"]),
        ({"value": 3}, TypeError, ["value", "int"]),
        ({"query": X.long()}, TypeError, ["query", "torch.int64", "float32"]),
        (
            {"query": X.cfloat(), "key": KEY.cfloat(), "value": KEY.cfloat()},
            TypeError,
            ["query", "complex64", "float32"],
        ),
        ({"key": KEY.double()}, TypeError, ["key", "torch.float64", "torch.float32"]),
        ({"value": KEY.half()}, TypeError, ["value", "torch.float16", "torch.float32"]),
        ({"value": KEY.to("meta")}, ValueError, ["value", "meta", "cpu"]),
        ({"query": X[0, 0, 0]}, ValueError, ["query", "(8,)", "(..., seqlen, head_dim)"]),
        ({"key": KEY[..., :4]}, ValueError, ["key", "(2, 3, 7, 4)", "8"]),
        ({"value": KEY[:, :, :6]}, ValueError, ["value", "(2, 3, 6, 8)", "7"]),
        ({"key": KEY[:, :2]}, ValueError, ["key (2, 2, 7, 8)", "query (2, 3, 5, 8)", "broadcast"]),
        ({"key": KEY[:, :2], "enable_gqa": True}, ValueError, ["key", "divides", "3", "2"]),
        ({"value": KEY[:, :0], "enable_gqa": True}, ValueError, ["value", "divides", "3", "0"]),
        ({"query": X[0, 0], "enable_gqa": True}, ValueError, ["query", "enable_gqa", "(5, 8)"]),
        ({"attn_mask": torch.zeros(5, 6)}, ValueError, ["attn_mask", "(5, 6)", "(2, 3, 5, 7)"]),
        ({"attn_mask": torch.zeros(3, 2, 5, 7)}, ValueError, ["attn_mask", "(3, 2, 5, 7)", "(2, 3, 5, 7)"]),
        ({"attn_mask": torch.zeros(1, 2, 3, 5, 7)}, ValueError, ["attn_mask", "(1, 2, 3, 5, 7)", "(2, 3, 5, 7)"]),
        ({"attn_mask": torch.zeros(5, 7).long()}, TypeError, ["attn_mask", "torch.int64", "bool"]),
        ({"attn_mask": [[True]]}, TypeError, ["attn_mask", "list"]),
        ({"attn_mask": torch.ones(5, 7), "is_causal": True}, ValueError, ["attn_mask", "is_causal"]),
        ({"dropout_p": 1.5}, ValueError, ["dropout_p", "1.5", "[0, 1)"]),
        ({"dropout_p": -0.1}, ValueError, ["dropout_p", "-0.1", "[0, 1)"]),
        ({"scale": "1"}, TypeError, ["scale", "str", "number"]),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        scaled_dot_product_attention(**{"query": X, "key": KEY, "value": KEY, **change})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("lead", [(), (3,), (2, 2, 3)], ids=str)
def test_bad_mask_of_other_ranks(lead: tuple[int, ...]) -> None:
    q, k = torch.zeros(*lead, 5, 8), torch.zeros(*lead, 7, 8)
    for shape in ((*lead, 5, 6), (4, *lead, 5, 7), (*(n + 1 for n in lead), 4, 7)):
        with pytest.raises(ValueError, match="attn_mask must be broadcastable"):
            scaled_dot_product_attention(q, k, k, torch.zeros(shape))


def test_everything_may_be_dropped() -> None:
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    for attend in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        out = attend(q, q, q, dropout_p=1.0)
        assert out.abs().max() == 0
        assert torch.autograd.grad(out.sum(), q)[0].abs().max() == 0
