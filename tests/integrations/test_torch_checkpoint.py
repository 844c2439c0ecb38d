"""Checkpoints of what runs on fastattn by `use`: the gradients are those of the same call without a checkpoint.

The forward is computed again in the backward pass, and must be what it was: on fastattn or on torch, with the same
dropout mask.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import fastattn
from fastattn.autograd import operators
from fastattn.integrations.torch import explain, switch, use

Run = Callable[[nn.Module, Tensor], Tensor]


@pytest.fixture
def fastattn_calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with each call that runs, or is traced, on fastattn."""
    calls: list[None] = []

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return fastattn.attention(*args, **kwargs)

    monkeypatch.setattr(switch, "attention", attention)
    return calls


class Layer(nn.Module):
    """Attention with dropout between two products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.first(x).view(2, 6, 3, 3, 8).movedim(2, 0).transpose(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True)
        return x + self.second(out.transpose(1, 2).flatten(2)).sin()


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(Layer(), nn.TransformerEncoderLayer(24, 4, 32, dropout=0.2, batch_first=True), Layer())


LAYERS = 3

# ------------------------------------------------------------------------------------- ways to begin a backward pass


def through_tensor(loss: Tensor, leaves: list[Tensor]) -> None:
    loss.backward()


def through_tensor_unbound(loss: Tensor, leaves: list[Tensor]) -> None:
    Tensor.backward(loss, retain_graph=True)


def through_autograd(loss: Tensor, leaves: list[Tensor]) -> None:
    torch.autograd.backward([loss], [torch.ones_like(loss)])


def through_inputs(loss: Tensor, leaves: list[Tensor]) -> None:
    loss.backward(inputs=leaves)


def through_grad(loss: Tensor, leaves: list[Tensor]) -> None:
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        leaf.grad = grad


STARTS = [through_tensor, through_tensor_unbound, through_autograd, through_inputs, through_grad]
REFUSED_WHEN_REENTRANT = (through_inputs, through_grad)  # by torch
ACCEPTED = [
    pytest.param(start, reentrant, id=f"{start.__name__}-{'reentrant' if reentrant else 'non-reentrant'}")
    for reentrant in (False, True)
    for start in STARTS
    if not (reentrant and start in REFUSED_WHEN_REENTRANT)
]


def at_once(start: Callable[[], None]) -> None:
    start()


def on_a_thread(start: Callable[[], None]) -> None:
    """As a backward pass on one of autograd's own threads, where nobody has called `use`."""
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()


def step(run: Run, start: Any = through_tensor, where: Any = at_once, forward: Any = use, backward: Any = use) -> Any:
    """The loss and the gradients of all parameters and of x, with the two passes in contexts of their own."""
    module = model()
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
    leaves = [x, *module.parameters()]
    torch.manual_seed(3)
    with forward():
        loss = run(module, x).square().sum()
    with backward():
        where(lambda: start(loss, leaves))
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def plain(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


# ------------------------------------------------------------------------------------------------- ways to checkpoint


def whole(reentrant: bool) -> Run:
    return lambda module, x: checkpoint(module, x, use_reentrant=reentrant)


def each_layer(reentrant: bool) -> Run:
    def run(module: Any, x: Tensor) -> Tensor:
        for layer in module:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return x

    return run


def nested(reentrant: bool) -> Run:
    return lambda module, x: checkpoint(each_layer(reentrant), module, x, use_reentrant=reentrant)


def sequential(reentrant: bool) -> Run:
    return lambda module, x: checkpoint_sequential(module, LAYERS, x, use_reentrant=reentrant)


def without_stopping_early(reentrant: bool) -> Run:
    def run(module: nn.Module, x: Tensor) -> Tensor:
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            return checkpoint(module, x, use_reentrant=reentrant)

    return run


REGIONS = [whole, each_layer, nested, sequential, without_stopping_early]


@pytest.mark.parametrize(("start", "reentrant"), ACCEPTED)
@pytest.mark.parametrize("region", REGIONS)
def test_gradients(region: Any, start: Any, reentrant: bool, fastattn_calls: list[None]) -> None:
    want = step(plain, start)
    assert len(fastattn_calls) == LAYERS
    found = step(region(reentrant), start)
    assert len(fastattn_calls) > 2 * LAYERS
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("start", "reentrant"), ACCEPTED)
@pytest.mark.parametrize("where", [at_once, on_a_thread])
@pytest.mark.parametrize("contexts", [(use, nullcontext), (nullcontext, use), (use, lambda: use(False))])
def test_recomputation_follows_the_forward(contexts: Any, start: Any, where: Any, reentrant: bool) -> None:
    """Not the switch at the backward pass, which may stand otherwise and on a thread that never heard of it."""
    want = step(plain, forward=contexts[0], backward=contexts[1])
    found = step(whole(reentrant), start, where, *contexts)
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)


def test_a_block_inside_and_the_default_device(fastattn_calls: list[None]) -> None:
    q, k, v = torch.randn(3, 2, 3, 6, 8, requires_grad=True).unbind()

    def half(q: Tensor) -> Tensor:
        assert torch.get_default_device() == torch.device("meta")
        with use(False):
            out = F.scaled_dot_product_attention(q, k, v)
        assert explain(q, k, v).active
        return F.scaled_dot_product_attention(out, k, v)

    with use(), torch.device("meta"):
        out = checkpoint(half, q, use_reentrant=False)
    (found,) = torch.autograd.grad(out.sum(), q)
    assert len(fastattn_calls) == 2
    assert not explain(q, k, v).active
    out = F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v), k, v)
    torch.testing.assert_close(found, torch.autograd.grad(out.sum(), q)[0])


def test_exceptions_in_the_recomputation_restore_the_switch() -> None:
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    calls = []

    def once(q: Tensor) -> Tensor:
        calls.append(explain(q, q, q).active)
        if len(calls) > 1:
            raise KeyError
        return F.scaled_dot_product_attention(q, q, q)

    with use():
        out = checkpoint(once, q, use_reentrant=False)
    with pytest.raises(KeyError):
        out.sum().backward()
    assert calls == [True, True]
    assert not explain(q, q, q).active


class Recomputed(torch.autograd.Function):
    """A checkpoint of somebody's own making, as in libraries that do not use torch's."""

    @staticmethod
    def forward(ctx: Any, run: Run, x: Tensor) -> Tensor:
        ctx.run, ctx.state = run, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)  # type: ignore[call-arg, arg-type]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.state)
            twin = x.detach().requires_grad_()
            torch.autograd.backward(ctx.run(twin), dout)
        return None, twin.grad


@pytest.mark.parametrize("start", STARTS)
def test_autograd_functions_that_recompute(start: Any, fastattn_calls: list[None]) -> None:
    """They see the switch as it stands at the backward pass, however that is begun."""
    if start in REFUSED_WHEN_REENTRANT:
        start_of_x = start
        start = lambda loss, leaves: start_of_x(loss, leaves[:1])  # noqa: E731
    want = step(plain, start)
    found = step(lambda module, x: Recomputed.apply(module, x), start)
    assert len(fastattn_calls) == 3 * LAYERS
    assert torch.equal(found[1], want[1])


# ------------------------------------------------------------------------------------------------------------ policies

ATEN = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def by_policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator is ATEN else CheckpointPolicy.MUST_RECOMPUTE


POLICIES: dict[str, tuple[Any, int]] = {
    # name -> a policy, how often attention is computed
    "torch's operators": ([torch.ops.aten.mm.default, ATEN], 1),
    "fastattn's operator": ([torch.ops.fastattn.forward.default], 1),
    "function": (by_policy, 1),
    "other operators": ([torch.ops.aten.mm.default], 2),
}


# Where nothing is kept, nothing keeps the seed, nor would it torch's.
@pytest.mark.parametrize(
    ("name", "preserve"), [(name, p) for p in (True, False) for name in POLICIES if p or POLICIES[name][1] == 1]
)
def test_policies_that_name_torchs_operators(name: str, preserve: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They mean fastattn's: what is kept, the dropout mask included, is not computed again."""
    policy, runs = POLICIES[name]
    runs_seen, real = [], operators.run_forward

    def run_forward(*args: Any) -> Any:
        runs_seen.append(None)
        return real(*args)

    def region(module: Any, x: Tensor) -> Tensor:
        context_fn = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(module[0], x, use_reentrant=False, preserve_rng_state=preserve, context_fn=context_fn)

    want = step(lambda module, x: module[0](x))
    monkeypatch.setattr(operators, "run_forward", run_forward)
    found = step(region, backward=nullcontext)
    assert len(runs_seen) == runs
    for a, b in zip(found, want, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_policies_that_count_are_asked_as_by_torch() -> None:
    """Every second attention is kept, under `use` too."""
    operators = [
        getattr(torch.ops.aten, f"_scaled_dot_product_{x}").default for x in ("efficient_attention", "flash_attention")
    ]
    q, k, v = torch.randn(3, 1, 2, 4, 8).requires_grad_().unbind()
    answers: dict[bool, list[bool]] = {}
    for on in (False, True):
        given = answers[on] = []

        def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if operator in (ATEN, *operators) and not context.is_recompute:
                given.append(len(given) % 2 == 1)  # noqa: B023
                return CheckpointPolicy.MUST_SAVE if given[-1] else CheckpointPolicy.PREFER_RECOMPUTE  # noqa: B023
            return CheckpointPolicy.PREFER_RECOMPUTE

        def region(q: Tensor) -> Tensor:
            for _ in range(4):
                q = F.scaled_dot_product_attention(q, k, v)
            return q

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        with use(on):
            checkpoint(region, q, use_reentrant=False, context_fn=contexts).sum().backward()
    assert answers[True] == answers[False] == [False, True, False, True]


# --------------------------------------------------------------------------------------------- other people's programs


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_hugging_face_models(inside: bool, reentrant: bool, fastattn_calls: list[None]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.2,
        attn_implementation="sdpa",
    )
    torch.manual_seed(4)
    llama = transformers.LlamaForCausalLM(config).train()
    tokens = torch.randint(31, (2, 9))
    results = []
    for on in (False, True):
        if on:
            llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
        llama.zero_grad()
        torch.manual_seed(5)
        with use():
            loss = llama(tokens, labels=tokens, use_cache=False).loss
        with use() if inside else nullcontext():
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in llama.parameters())])
    assert len(fastattn_calls) == 6
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("backward", [use, nullcontext])
def test_checkpoint_of_a_compiled_function(backward: Any, reentrant: bool) -> None:
    def run(module: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(torch.compile(module, backend="aot_eager"), x, use_reentrant=reentrant)

    want = step(lambda module, x: torch.compile(module, backend="aot_eager")(x))
    for a, b in zip(step(run, backward=backward), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("backward", [use, nullcontext])
def test_compiled_function_that_checkpoints(backward: Any, reentrant: bool, fastattn_calls: list[None]) -> None:
    """No mode sees into the checkpoint then: torch.compile makes it an operator, and hides all modes from its body."""
    want = step(torch.compile(plain, backend="aot_eager"), forward=nullcontext, backward=nullcontext)
    run = torch.compile(whole(reentrant), backend="aot_eager", fullgraph=True)
    found = step(run, backward=backward)
    assert len(fastattn_calls) == 0
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_compiled_function_that_checkpoints_fastattn(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called by its own name it needs no mode, and draws no second seed."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", fastattn.scaled_dot_product_attention)
    want = step(plain, forward=nullcontext)
    run = torch.compile(each_layer(reentrant), backend="aot_eager", fullgraph=True)
    for a, b in zip(step(run, forward=nullcontext), want, strict=True):
        torch.testing.assert_close(a, b)
