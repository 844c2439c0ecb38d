"""torch.utils.checkpoint and its policies on fastattn's own functions: the gradients are those without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastattn
from fastattn.autograd import operators

FORWARD, DRAW_SEED = torch.ops.fastattn.forward.default, torch.ops.fastattn.draw_seed.default
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture
def forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with each forward pass that is computed by the operator."""
    passes: list[None] = []
    real = operators.run_forward

    def run_forward(*args: Any) -> Any:
        passes.append(None)
        return real(*args)

    monkeypatch.setattr(operators, "run_forward", run_forward)
    return passes


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = fastattn.attention(q.sin(), k, v, causal=True, dropout_p=0.3, return_lse=True)
    return out.sin() + lse[..., None].to(out.dtype)


def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cu = torch.tensor([0, 4, 9, 12], dtype=torch.int32)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return fastattn.attention_varlen(q.sin(), k, v, cu, cu, dropout_p=0.3).sin()


def without_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fastattn.attention(q, k, v)  # the shortest way, where nothing looks on


def two_layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dense(dense(q, k, v), k, v)


CALLS = {"dense": (dense, 1), "varlen": (varlen, 1), "without dropout": (without_dropout, 1), "two": (two_layers, 2)}


def step(attend: Attend, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The output and the gradients."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 6, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    torch.manual_seed(2)
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]


@pytest.mark.parametrize(
    "kept", [[FORWARD], [DRAW_SEED], [FORWARD, DRAW_SEED], []], ids=["forward", "seed", "both", "none"]
)
@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_policies(name: str, preserve: bool, kept: list[Any], dtype: torch.dtype, forward_passes: list[None]) -> None:
    """Whatever a policy keeps, the mask is one in both passes, if the policy or the random state keeps the seed."""
    attend, layers = CALLS[name]
    seen: list[Any] = []

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> bool:
        if not context.is_recompute:
            seen.append(operator)
        return operator in kept

    def run(*qkv: Tensor) -> Tensor:
        return checkpoint(
            attend,
            *qkv,
            use_reentrant=False,
            preserve_rng_state=preserve,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )

    want = step(attend, dtype)
    before = len(forward_passes)
    found = step(run, dtype)
    assert seen.count(FORWARD) == layers
    assert seen.count(DRAW_SEED) == (0 if attend is without_dropout else layers)
    assert len(forward_passes) - before == (layers if FORWARD in kept else 2 * layers)
    same = [torch.equal(a, b) for a, b in zip(found, want, strict=True)]
    lost = not preserve and not kept and attend is not without_dropout  # as torch's own dropout loses its mask
    assert all(same) != lost


@pytest.mark.parametrize("kept", [[FORWARD], []], ids=["forward", "none"])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_policies(name: str, kept: list[Any]) -> None:
    """The compiler's backward pass gets the same mask, whether it computes attention again or not."""
    attend, _ = CALLS[name]

    def context() -> Any:
        return create_selective_checkpoint_contexts(kept)

    @torch.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    def run(*qkv: Tensor) -> Tensor:
        return checkpoint(attend, *qkv, use_reentrant=False, context_fn=context)

    for a, b in zip(step(run), step(attend), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_without_a_policy(name: str, reentrant: bool) -> None:
    attend, _ = CALLS[name]

    def run(*qkv: Tensor) -> Tensor:
        return checkpoint(attend, *qkv, use_reentrant=reentrant)

    def backward(attend: Attend) -> list[Tensor | None]:
        torch.manual_seed(3)
        q, k, v = torch.randn(3, 2, 3, 6, 8)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        attend(*leaves).square().sum().backward()
        return [x.grad for x in leaves]

    for a, b in zip(backward(run), backward(attend), strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
