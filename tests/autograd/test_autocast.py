"""torch.autocast treats the functions as it treats torch's own scaled_dot_product_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import attention, attention_varlen, attention_with_kv_cache

LOW = (torch.bfloat16, torch.float16)


def inputs(*dtypes: torch.dtype) -> list[Tensor]:
    return [torch.randn(2, 3, 6, 8).to(dtype).requires_grad_() for dtype in dtypes]


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize(
    "given",
    [(torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float16), (torch.bfloat16,) * 3, (torch.float64,) * 3],
    ids=str,
)
def test_as_torchs(given: tuple[torch.dtype, ...], low: torch.dtype) -> None:
    """Same output dtype, and gradients in the dtypes that went in; float64 stays out of it."""
    x = inputs(*given)
    with torch.autocast("cpu", dtype=low):
        out, lse = attention(*x, causal=True, return_lse=True)
        want = F.scaled_dot_product_attention(*x, is_causal=True)
    assert out.dtype == want.dtype
    assert lse.dtype == (torch.float64 if out.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    found = torch.autograd.grad(out.sum(), x)
    for a, b, leaf in zip(found, torch.autograd.grad(want.sum(), x), x, strict=True):
        assert a.dtype == b.dtype == leaf.dtype
        torch.testing.assert_close(a, b, rtol=4e-2, atol=4e-2)


def test_equals_casting_by_hand() -> None:
    x = inputs(torch.float32, torch.float32, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*x)
    assert torch.equal(out, attention(*(t.bfloat16() for t in x)))


def test_other_floats_keep_their_precision() -> None:
    """bias, sinks and slopes take part in float32 sums anyway; their gradients come back as they are."""
    x = inputs(torch.float32, torch.float32, torch.float32)
    extras = {"bias": torch.randn(6, 6, requires_grad=True), "sinks": torch.randn(3, requires_grad=True)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*x, alibi_slopes=torch.rand(3), mask=torch.ones(6, 6, dtype=torch.bool), **extras)
    out.sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in extras.values())


def test_varlen() -> None:
    x = [torch.randn(6, 2, 8) for _ in range(3)]
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    with torch.autocast("cpu", dtype=torch.float16):
        assert attention_varlen(*x, cu, cu).dtype == torch.float16
    assert attention_varlen(*x, cu, cu).dtype == torch.float32


def test_disabled_inside() -> None:
    x = inputs(torch.float32, torch.float32, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert attention(*x).dtype == torch.float32


def test_mixed_dtypes_are_an_error_without_it() -> None:
    with pytest.raises(TypeError, match=r"k has dtype torch\.bfloat16"):
        attention(*inputs(torch.float32, torch.bfloat16, torch.float32))


def test_compiled() -> None:
    compiled = torch.compile(lambda *x: attention(*x, causal=True), backend="aot_eager", fullgraph=True)
    x = inputs(torch.float32, torch.float32, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, want = compiled(*x), attention(*x, causal=True)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, want)
    for a, b in zip(torch.autograd.grad(found.sum(), x), torch.autograd.grad(want.sum(), x), strict=True):
        assert torch.equal(a, b)


def test_cache_is_used_in_its_own_dtype() -> None:
    """A cache cannot be cast, so a call with one keeps to the given dtypes and to float32 sums."""
    q, cache = torch.randn(2, 3, 2, 8), torch.randn(2, 3, 9, 8)
    lengths = torch.tensor([9, 4], dtype=torch.int32)
    want = attention_with_kv_cache(q, cache, cache, cache_lengths=lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_with_kv_cache(q, cache, cache, cache_lengths=lengths), want)
