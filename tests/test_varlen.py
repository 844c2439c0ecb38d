"""Packed sequences: each is computed as if it were alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference

from . import cases
from .cases import Case, build
from .test_backward import check as check_backward
from .test_forward import check as check_forward
from .tolerance import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.VARLEN, ids=str)
def test_forward(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    check_forward(case, dtype, backend, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases.VARLEN, ids=str)
def test_backward(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    check_backward(case, dtype, backend, device)


def int32(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def test_equals_the_sequences_one_by_one(backend: str, device: str) -> None:
    lengths = ((7, 19), (1, 33), (23, 5))
    q, k, v = (torch.randn(n, 4, 16, device=device) for n in (31, 57, 57))
    bias = torch.randn(3, 4, 23, 33, device=device)
    slopes = torch.rand(3, 4, device=device)
    options = {"causal": True, "window": (6, 2), "backend": backend, "return_lse": True}
    cu = int32(0, 7, 8, 31, device=device), int32(0, 19, 52, 57, device=device)
    out, lse = fastattn.attention_varlen(q, k, v, *cu, bias=bias, alibi_slopes=slopes, **options)
    start_q = start_k = 0
    for b, (rows, cols) in enumerate(lengths):
        parts = [
            x[start : start + n].transpose(0, 1)[None]
            for x, start, n in ((q, start_q, rows), (k, start_k, cols), (v, start_k, cols))
        ]
        own = {"bias": bias[b : b + 1, :, :rows, :cols], "alibi_slopes": slopes[b]}
        one, one_lse = fastattn.attention(*parts, **own, **options)
        torch.testing.assert_close(out[start_q : start_q + rows], one[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, start_q : start_q + rows], one_lse[0])
        start_q, start_k = start_q + rows, start_k + cols


def test_equals_padded_batch_with_kv_lengths(backend: str, device: str) -> None:
    """Key lengths alone: the same as a dense batch whose keys are padded."""
    lengths = [3, 0, 8]
    q, k, v = (torch.randn(3, 2, n, 16, device=device) for n in (5, 8, 8))
    kv_lengths = int32(*lengths, device=device)
    out, lse = fastattn.attention(q, k, v, kv_lengths=kv_lengths, causal=True, return_lse=True, backend=backend)
    keys = [torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)]) for x in (k, v)]
    queries = q.transpose(1, 2).flatten(0, 1)
    cu = int32(0, 5, 10, 15, device=device), int32(0, 3, 3, 11, device=device)
    packed, packed_lse = fastattn.attention_varlen(queries, *keys, *cu, causal=True, return_lse=True, backend=backend)
    torch.testing.assert_close(packed.view(3, 5, 2, 16).transpose(1, 2), out)
    torch.testing.assert_close(packed_lse.view(2, 3, 5).transpose(0, 1), lse)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_spare_tokens_are_not_read(poison: float, backend: str, device: str) -> None:
    """Neither rows behind the last sequence, nor keys past kv_lengths, nor the columns of bias that belong to them."""
    case = Case(
        "spare", lengths=((4, 6), (3, 7)), kv_lengths=(6, 2), spare=(2, 3), bias="bhqk", causal=True, sinks=True
    )
    clean, dirty = build(case, torch.float32, device), build(case, torch.float32, device)
    for tensor, start in ((dirty.q, 7), (dirty.k, 8), (dirty.v, 8)):
        tensor[start:] = poison
    dirty.options["bias"][0, :, :, 6:] = poison
    dirty.options["bias"][1, :, :, 2:] = poison
    dirty.options["bias"][1, :, 3:] = poison
    results = []
    for call in (clean, dirty):
        leaves = call.requires_grad()
        out, lse = call.run(return_lse=True, backend=backend)
        seen = lse.masked_fill(lse == -torch.inf, 0.0)
        results.append([out, lse, *torch.autograd.grad(out.sin().sum() + seen.sin().sum(), list(leaves.values()))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_tokens_behind_the_last_sequence(backend: str, device: str) -> None:
    q, k = torch.randn(6, 2, 8, device=device, requires_grad=True), torch.randn(5, 2, 8, device=device)
    cu = int32(0, 4, device=device), int32(0, 5, device=device)
    out, lse = fastattn.attention_varlen(q, k, k, *cu, return_lse=True, backend=backend)
    assert out[4:].abs().max() == 0
    assert (lse[:, 4:] == -torch.inf).all()
    out.sum().backward()
    assert q.grad[4:].abs().max() == 0
    assert q.grad[:4].abs().max() > 0


def test_layout_of_out(backend: str, device: str) -> None:
    q = torch.randn(2, 6, 8, device=device)
    cu = int32(0, 6, device=device)
    heads_first, lse = fastattn.attention_varlen(*[q.transpose(0, 1)] * 3, cu, cu, return_lse=True, backend=backend)
    assert heads_first.transpose(0, 1).is_contiguous()
    assert lse.shape == (2, 6)
    assert lse.is_contiguous()
    tokens_first = fastattn.attention_varlen(*[q.transpose(0, 1).contiguous()] * 3, cu, cu, backend=backend)
    assert tokens_first.is_contiguous()


def test_reference_function() -> None:
    call = build(cases.VARLEN[-1], torch.float64)
    leaves = call.requires_grad()
    out, lse = reference.attention_varlen(call.q, call.k, call.v, *call.cu_seqlens, return_lse=True, **call.options)
    want = cases.expected(call.case, torch.float64)
    assert_close("out", out, want.exact.out, want.eager_out, torch.float64)
    assert_close("lse", lse, want.exact.lse, want.eager_lse, torch.float64)
    grads = torch.autograd.grad((out, lse), list(leaves.values()), (want.dout, want.dlse))
    for name, grad in zip(leaves, grads, strict=True):
        assert_close(f"d{name}", grad, want.exact.grads[name], want.eager_grads[name], torch.float64)
