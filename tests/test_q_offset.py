"""q_offset: parts of a sequence give what the whole gives, whichever way the offset comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

CHUNK = 7
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (6, 2)},
    "alibi": {"alibi_slopes": torch.tensor([0.3, 0.7, 0.1, 0.2])},
    "dropout": {"causal": True, "dropout_p": 0.4, "seed": 11},
    "everything": {
        **{"causal": True, "window": (9, None), "dropout_p": 0.2, "seed": 3, "softcap": 2.0},
        **{"alibi_slopes": torch.tensor([0.3, 0.7, 0.1, 0.2]), "sinks": torch.tensor([0.1, 0.5, -0.2, 0.0])},
    },
}


def operands(device: str) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    return tuple(torch.randn(2, heads, 23, 16, generator=random).to(device) for heads in (4, 2, 2))  # type: ignore[return-value]


def moved(options: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}


@pytest.mark.needs_dtype(torch.float32)
@pytest.mark.parametrize("name", OPTIONS)
def test_chunks_give_what_the_whole_gives(name: str, backend: str, device: str) -> None:
    """Chunked prefill: output, lse, and the gradients of all operands, dropout included."""
    q, k, v = operands(device)
    options: dict[str, Any] = {**moved(OPTIONS[name], device), "backend": backend, "return_lse": True}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    whole = fastattn.attention(*leaves, **options)
    parts = [
        fastattn.attention(chunk, *leaves[1:], q_offset=start, **options)
        for start, chunk in zip(range(0, 23, CHUNK), leaves[0].split(CHUNK, dim=2), strict=True)
    ]
    out, lse = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    torch.testing.assert_close(out, whole[0])
    torch.testing.assert_close(lse, whole[1])
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    found, want = torch.autograd.grad(out, leaves, dout), torch.autograd.grad(whole[0], leaves, dout)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.needs_dtype(torch.float32)
def test_a_number_is_that_number_for_each_sequence(backend: str, device: str) -> None:
    q, k, v = operands(device)
    same = torch.full((2,), 9, dtype=torch.int32, device=device)
    options: dict[str, Any] = {"causal": True, "backend": backend}
    assert torch.equal(
        fastattn.attention(q, k, v, q_offset=9, **options), fastattn.attention(q, k, v, q_offset=same, **options)
    )
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    ends = torch.tensor([0, 23, 46], dtype=torch.int32, device=device)
    out = fastattn.attention_varlen(*packed, ends, ends, q_offset=9, **options)
    again = fastattn.attention_varlen(*packed, ends, ends, q_offset=same, **options)
    assert torch.equal(out, again)
    lengths = torch.tensor([20, 23], dtype=torch.int32, device=device)
    first = fastattn.attention_with_kv_cache(q, k, v, cache_lengths=lengths, q_offset=9, **options)
    second = fastattn.attention_with_kv_cache(q, k, v, cache_lengths=lengths, q_offset=same, **options)
    assert torch.equal(first, second)


@pytest.mark.needs_dtype(torch.float32)
def test_the_alignment_does_not_matter(backend: str, device: str) -> None:
    q, k, v = operands(device)
    options: dict[str, Any] = {"causal": True, "q_offset": 3, "backend": backend}
    top, bottom = (
        fastattn.attention(q, k, v, causal_alignment=alignment, **options) for alignment in ("top-left", "bottom-right")
    )
    assert torch.equal(top, bottom)


def test_vmap() -> None:
    """An offset for each problem, one for all, and a number."""
    q, k, v = (x.unflatten(0, (2, 1)) for x in operands("cpu"))
    offsets = torch.tensor([[4], [15]], dtype=torch.int32)

    def call(q: Tensor, k: Tensor, v: Tensor, q_offset: Any) -> Tensor:
        return fastattn.attention(q, k, v, causal=True, q_offset=q_offset)

    found = torch.func.vmap(call)(q, k, v, offsets)
    assert torch.equal(found, torch.stack([call(*x) for x in zip(q, k, v, offsets, strict=True)]))
    for one in (offsets[0], 4):
        found = torch.func.vmap(call, in_dims=(0, 0, 0, None))(q, k, v, one)
        assert torch.equal(found, torch.stack([call(*x, one) for x in zip(q, k, v, strict=True)]))


def test_compiled_for_every_offset() -> None:
    """The offset is a symbol of the graph, as sizes are: a loop over chunks compiles once more, and no further."""
    q, k, v = operands("cpu")
    frames = []

    def compiler(graph: Any, _: Any) -> Any:
        frames.append(graph)
        return graph.forward

    def call(q: Tensor, start: int) -> Tensor:
        return fastattn.attention(q, k, v, causal=True, q_offset=start)

    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    for start in (3, 4, 5, 6, 12):
        assert torch.equal(compiled(q, start), call(q, start))
    assert len(frames) <= 2


def test_second_derivatives() -> None:
    q, k, v = (x[:1, :, :5].double().requires_grad_() for x in operands("cpu"))
    torch.autograd.gradgradcheck(
        lambda q, k, v: fastattn.attention(q, k, v, causal=True, q_offset=1, window=(2, None)), (q, k, v), atol=1e-4
    )


def test_explain_takes_it() -> None:
    q, k, v = operands("cpu")
    assert "q_offset" in str(fastattn.explain(q, k, v, q_offset=3))


def test_flops_of_chunks_add_up() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = operands("cpu")

    def flops(q: Tensor, **options: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            fastattn.attention(q, k, v, causal=True, **options)
        return counter.get_total_flops()

    parts = [flops(part, q_offset=CHUNK * i) for i, part in enumerate(q.split(CHUNK, dim=2))]
    assert sum(parts) == flops(q) > 0
