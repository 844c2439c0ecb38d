"""merge_states: attention over a union of disjoint key sets, from its parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastattn import attention, attention_varlen, merge_states, reference

from . import cases

SPLITS = ((30,), (7, 23), (1, 29), (10, 0, 20), (0, 30), (3, 4, 5, 18))


def parts(q: Tensor, k: Tensor, v: Tensor, split: tuple[int, ...], **options: object) -> list[tuple[Tensor, Tensor]]:
    keys, values = k.split(list(split), dim=-2), v.split(list(split), dim=-2)
    return [attention(q, a, b, return_lse=True, **options) for a, b in zip(keys, values, strict=True)]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_equals_the_whole(split: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 8)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out, lse = merge_states(*zip(*parts(q, k, v, split), strict=True))
    want, want_lse = attention(q, k, v, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == want_lse.dtype
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out, want, rtol=rounding, atol=rounding)
    torch.testing.assert_close(lse, want_lse)


def test_order_does_not_matter_nor_grouping() -> None:
    q, k, v = torch.randn(3, 1, 2, 30, 8, dtype=torch.float64).unbind()
    a, b, c = parts(q, k, v, (5, 10, 15))
    together = merge_states(*zip(a, b, c, strict=True))
    for first, second in ((merge_states(*zip(a, b, strict=True)), c), (merge_states(*zip(c, a, strict=True)), b)):
        grouped = merge_states(*zip(first, second, strict=True))
        torch.testing.assert_close(grouped, together)


def test_stacked_states() -> None:
    q, k, v = torch.randn(3, 1, 2, 30, 8).unbind()
    states = parts(q, k, v, (12, 18))
    outs, lses = zip(*states, strict=True)
    for a, b in zip(merge_states(torch.stack(outs), torch.stack(lses)), merge_states(outs, lses), strict=True):
        assert torch.equal(a, b)


def test_varlen() -> None:
    q, k, v = torch.randn(6, 2, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 4)
    cu_q = torch.tensor([0, 2, 6], dtype=torch.int32)
    cu_k = torch.tensor([0, 5, 9], dtype=torch.int32)
    first, second = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([2, 3], dtype=torch.int32)
    rows = torch.tensor([0, 1, 2, 5]), torch.tensor([3, 4, 6, 7, 8])
    states = []
    for lengths, tokens in ((first, rows[0]), (second, rows[1])):
        cu = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
        states.append(attention_varlen(q, k[tokens], v[tokens], cu_q, cu, return_lse=True))
    out, lse = merge_states(*zip(*states, strict=True))
    want, want_lse = attention_varlen(q, k, v, cu_q, cu_k, return_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


def test_sink_in_one_part() -> None:
    q, k, v = torch.randn(3, 1, 2, 30, 8, dtype=torch.float64).unbind()
    sinks = torch.randn(2, dtype=torch.float64)
    with_sink = attention(q, k[:, :, :9], v[:, :, :9], sinks=sinks, return_lse=True)
    without = attention(q, k[:, :, 9:], v[:, :, 9:], return_lse=True)
    found = merge_states(*zip(with_sink, without, strict=True))
    torch.testing.assert_close(found, attention(q, k, v, sinks=sinks, return_lse=True))


def test_rows_without_keys() -> None:
    """A state that saw nothing does not count, whatever its out holds; if none saw anything the row is empty."""
    out = torch.randn(3, 1, 1, 4, 2)
    lse = torch.randn(3, 1, 1, 4)
    lse[0, ..., 1] = lse[:, ..., 2] = -torch.inf
    out[0, ..., 1, :] = torch.nan
    merged, merged_lse = merge_states(out, lse)
    without = merge_states(out[1:], lse[1:])
    assert torch.equal(merged[..., 1, :], without[0][..., 1, :])
    assert torch.equal(merged_lse[..., 1], without[1][..., 1])
    assert merged[..., 2, :].abs().max() == 0
    assert merged_lse[..., 2].item() == -torch.inf


def test_infinite_scores_stay_visible() -> None:
    """lse = +inf is a row without keys only where out is 0; a score of +inf gives NaN, as in torch's softmax."""
    q, k, v = torch.randn(3, 1, 1, 4, 8).unbind()
    bias = torch.zeros(4, 4)
    bias[1, 2] = torch.inf
    with_inf = attention(q, k, v, bias=bias, return_lse=True)
    out, lse = merge_states(*zip(with_inf, attention(q, k, v, return_lse=True), strict=True))
    assert out.isnan().all(dim=-1).flatten().tolist() == [False, True, False, False]
    out = torch.randn(2, 1, 1, 2, 4)
    out[0, ..., 0, :3] = 0.0  # not throughout
    lse = torch.zeros(2, 1, 1, 2)
    lse[0] = torch.inf
    assert merge_states(out, lse)[0].isnan().all()


def test_without_values_nothing_says_that_a_row_is_empty() -> None:
    """head_dim_v = 0: lse = +inf stays what it is, an infinite sum."""
    out, lse = torch.zeros(2, 1, 1, 3, 0), torch.zeros(2, 1, 1, 3)
    lse[0, ..., 1], lse[:, ..., 2] = torch.inf, -torch.inf
    merged, merged_lse = merge_states(out, lse)
    assert merged.shape == (1, 1, 3, 0)
    assert merged_lse[..., 1].isnan().all()
    torch.testing.assert_close(merged_lse[..., 0], torch.full((1, 1), 2.0).log())
    assert merged_lse[..., 2].item() == -torch.inf


@pytest.mark.parametrize("shift", [-1e30, -1e4, 1e4, 1e30])
def test_large_lse(shift: float) -> None:
    out = torch.randn(2, 1, 1, 3, 4)
    lse = torch.zeros(2, 1, 1, 3) + shift
    merged, merged_lse = merge_states(out, lse)
    torch.testing.assert_close(merged, out.mean(0))
    torch.testing.assert_close(merged_lse, lse[0] + torch.log(torch.tensor(2.0)))
    far, _ = merge_states(out, torch.stack((lse[0], lse[0] - 200.0 - abs(shift))))
    assert torch.equal(far, out[0])


def test_nan_propagates() -> None:
    out, lse = torch.randn(2, 1, 1, 2, 3), torch.randn(2, 1, 1, 2)
    out[1, 0, 0, 0, 2] = torch.nan
    merged, _ = merge_states(out, lse)
    assert merged.isnan().nonzero().tolist() == [[0, 0, 0, 2]]


def test_gradients_are_those_of_the_whole() -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 12, 8, dtype=torch.float64))
    leaves = (q, k, v)
    cotangents = torch.randn(1, 2, 12, 8, dtype=torch.float64), torch.randn(1, 2, 12, dtype=torch.float64)
    whole = torch.autograd.grad(attention(q, k, v, return_lse=True), leaves, cotangents)
    merged = merge_states(*zip(*parts(q, k, v, (5, 0, 7)), strict=True))
    for a, b in zip(torch.autograd.grad(merged, leaves, cotangents), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck() -> None:
    outs = torch.randn(3, 1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(merge_states, (outs, lses))
    assert torch.autograd.gradgradcheck(merge_states, (outs, lses))


def test_no_gradient_of_an_empty_row_is_nan() -> None:
    outs = torch.randn(2, 1, 1, 3, 2, requires_grad=True)
    lses = torch.tensor([[0.5, -torch.inf, -torch.inf], [0.1, 0.3, -torch.inf]]).view(2, 1, 1, 3).requires_grad_()
    out, lse = merge_states(outs, lses)
    (out.sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()).backward()
    assert outs.grad.isfinite().all()
    assert lses.grad.isfinite().all()
    assert outs.grad[0, ..., 1:, :].abs().max() == 0


def test_reference_is_mergeable_too() -> None:
    q, k, v = torch.randn(3, 1, 2, 12, 8, dtype=torch.float64).unbind()
    halves = [reference.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(5), slice(5, 12))]
    torch.testing.assert_close(merge_states(*zip(*halves, strict=True)), attention(q, k, v, return_lse=True))


ROWS = (1, 2, 3)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "words"),
    [
        ([], [], ValueError, ["outs", "lses", "at least 1", "0 and 0"]),
        ([torch.zeros(*ROWS, 4)], [torch.zeros(ROWS)] * 2, ValueError, ["outs", "lses", "1 and 2"]),
        (
            [torch.zeros(*ROWS, 4), torch.zeros(3)],
            [torch.zeros(ROWS)] * 2,
            ValueError,
            ["outs[1]", "(3,)", "(1, 2, 3, 4)"],
        ),
        ([torch.zeros(2, 3)], [torch.zeros(3, 2)], ValueError, ["outs[0]", "(2, 3)", "head_dim_v"]),
        ([torch.zeros(*ROWS, 4)], [torch.zeros(1, 3, 2)], ValueError, ["lses[0]", "(1, 3, 2)", "(1, 2, 3)"]),
        ([torch.zeros(3, 2, 4)], [torch.zeros(3, 2)], ValueError, ["lses[0]", "(3, 2)", "(2, 3)"]),
        ([torch.zeros(*ROWS, 4).int()], [torch.zeros(ROWS)], TypeError, ["outs[0]", "torch.int32", "floating"]),
        ([torch.zeros(*ROWS, 4)], [torch.zeros(ROWS).long()], TypeError, ["lses[0]", "torch.int64", "floating"]),
        ([[1.0]], [torch.zeros(ROWS)], TypeError, ["outs[0]", "list", "tensor"]),
        (
            [torch.zeros(*ROWS, 4), torch.zeros(*ROWS, 4).double()],
            [torch.zeros(ROWS)] * 2,
            ValueError,
            ["outs[1]", "torch.float64", "torch.float32"],
        ),
        (
            [torch.zeros(*ROWS, 4), torch.zeros(*ROWS, 4, device="meta")],
            [torch.zeros(ROWS)] * 2,
            ValueError,
            ["outs[1]", "meta", "cpu"],
        ),
    ],
)
def test_bad_input(outs: list, lses: list, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        merge_states(outs, lses)
    for word in words:
        assert word in str(caught.value)
