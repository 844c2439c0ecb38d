"""fastattn.integrations.torch: calls of torch's scaled_dot_product_attention run on fastattn, and mean the same.

`fastattn_calls` counts what reaches fastattn, so that no test passes because torch ran.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.utils.checkpoint import checkpoint

import fastattn
import fastattn.nn as fnn
from fastattn.backends.reference import ReferenceBackend
from fastattn.integrations.torch import explain, switch, use

from ..test_sdpa import CALLS, arguments, evaluate
from ..tolerance import assert_close, to_numpy


@pytest.fixture(autouse=True)
def _torch_afterwards() -> Iterator[None]:
    assert torch.overrides._get_current_function_mode_stack() == []
    yield
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.fixture
def fastattn_calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with each call that runs, or is traced, on fastattn."""
    calls: list[None] = []

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return fastattn.attention(*args, **kwargs)

    monkeypatch.setattr(switch, "attention", attention)
    return calls


def qkv(*shape: int) -> list[Tensor]:
    return list(torch.randn(3, *(shape or (2, 3, 6, 8))).unbind())


# --------------------------------------------------------------------------------------------------- the same results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_torchs(name: str, dtype: torch.dtype, fastattn_calls: list[None]) -> None:
    tensors, keywords = arguments(name, dtype)
    with use():
        found = evaluate(F.scaled_dot_product_attention, tensors, keywords)
    assert len(fastattn_calls) == 1
    wide = [x.double() if x.is_floating_point() else x for x in tensors]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = evaluate(F.scaled_dot_product_attention, wide, keywords)
        yardstick = evaluate(F.scaled_dot_product_attention, tensors, keywords)
    assert len(fastattn_calls) == 1
    for which, a, want, b in zip(("out", "query", "key", "value", "attn_mask"), found, exact, yardstick, strict=False):
        assert_close(which, a, to_numpy(want), b, dtype, largest_term=1.0 if which == "attn_mask" else 0.0)


def test_names_imported_before_and_keywords(fastattn_calls: list[None]) -> None:
    q, k, v = qkv()
    with use():
        outs = [
            imported_before(q, k, v, None, 0.0, True),
            torch._C._nn.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True),
        ]
    assert len(fastattn_calls) == 2
    for out in outs:
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))


PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"key_padding_mask": PADDING}, {"attn_mask": CAUSAL, "is_causal": True}])
def test_multihead_attention(training: bool, options: dict[str, Any], fastattn_calls: list[None]) -> None:
    module = nn.MultiheadAttention(24, 3, batch_first=True).train(training)
    x = torch.randn(2, 6, 24)
    results = []
    for on in (False, True):
        leaf = x.clone().requires_grad_()
        with use(on):
            out, weights = module(leaf, leaf, leaf, need_weights=False, **options)
        assert weights is None
        results.append((out, *torch.autograd.grad(out.square().sum(), (leaf, *module.parameters()))))
    assert len(fastattn_calls) == 1
    torch.testing.assert_close(results[1], results[0])


def test_weights_come_from_torch(fastattn_calls: list[None]) -> None:
    """need_weights=True never calls scaled_dot_product_attention."""
    module, x = nn.MultiheadAttention(24, 3, batch_first=True).eval(), torch.randn(2, 6, 24)
    with torch.no_grad():
        want = module(x, x, x)
        with use():
            found = module(x, x, x)
    assert found[1].shape == (2, 6, 6)
    torch.testing.assert_close(found, want)
    assert fastattn_calls == []


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_encoder_with_padding(training: bool, gradients: bool, fastattn_calls: list[None]) -> None:
    """In evaluation torch has a native way around its Python functions, which is left meanwhile and taken again."""
    model, x = encoder().train(training), torch.randn(2, 6, 24)
    with torch.set_grad_enabled(gradients):
        want = model(x, src_key_padding_mask=PADDING)
        with use():
            found = model(x, src_key_padding_mask=PADDING)
        assert len(fastattn_calls) == 2
        again = model(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(found[~PADDING], want[~PADDING])
    assert torch.equal(again, want)
    assert len(fastattn_calls) == 2


def test_whole_transformer(fastattn_calls: list[None]) -> None:
    model = nn.Transformer(24, 4, 2, 2, 32, dropout=0.0, batch_first=True)
    source, target = torch.randn(2, 6, 24), torch.randn(2, 6, 24)

    def run() -> list[Tensor]:
        out = model(source, target, tgt_mask=CAUSAL, src_key_padding_mask=PADDING, memory_key_padding_mask=PADDING)
        return [out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))]

    want = run()
    with use():
        found = run()
    assert len(fastattn_calls) == 6
    torch.testing.assert_close(found, want)


def test_autocast_checkpoint_and_second_derivatives(fastattn_calls: list[None]) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    with use(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    assert len(fastattn_calls) == 1
    grads = []
    for on in (True, False):
        with use(on):
            out = checkpoint(lambda q: F.scaled_dot_product_attention(q, k, v).sin(), q, use_reentrant=False)
            grads.append(torch.autograd.grad(out.sum(), (q, k, v)))
    assert len(fastattn_calls) == 3  # forward, and again for backward
    torch.testing.assert_close(*grads)
    penalties = []
    for on in (True, False):
        with use(on), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            (dq,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), q, create_graph=True)
            penalties.append(torch.autograd.grad(dq.square().sum(), (q, k, v)))
    torch.testing.assert_close(*penalties)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms(fastattn_calls: list[None]) -> None:
    q, k, v = qkv(4, 2, 3, 6, 8)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()

    results = []
    for on in (True, False):
        with use(on):
            results.append(torch.func.vmap(torch.func.grad(loss))(q, k, v))
    assert len(fastattn_calls) == 1
    torch.testing.assert_close(*results)


def test_rows_that_see_nothing_and_memory_order(fastattn_calls: list[None]) -> None:
    q, k, v = (x.transpose(1, 2) for x in qkv(2, 6, 3, 8))
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[3] = False
    with use():
        out = F.scaled_dot_product_attention(q, k, v, mask)
        contiguous = F.scaled_dot_product_attention(q.contiguous(), k, v, mask)
    assert len(fastattn_calls) == 2
    assert out[:, :, 3].abs().max() == 0
    assert out.transpose(1, 2).is_contiguous()
    assert contiguous.is_contiguous()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask))


def test_derivatives_under_the_switch(fastattn_calls: list[None]) -> None:
    """Calls of torch.autograd are torch functions too, which the switch hands on."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 3, 4))
    results = []
    for on in (True, False):
        with use(on):
            out = F.scaled_dot_product_attention(q, k, v)
            many = torch.autograd.grad(out, q, torch.ones(3, *out.shape), is_grads_batched=True, retain_graph=True)
            q.grad = None
            out.square().sum().backward(inputs=[q])
            jacobian = torch.autograd.functional.jacobian(lambda q: F.scaled_dot_product_attention(q, k, v), q)
            results.append((*many, q.grad, jacobian))
    assert len(fastattn_calls) == 2
    torch.testing.assert_close(*results)


def test_dropout_is_reproducible_and_fastattns() -> None:
    q, k = torch.zeros(2, 4, 30, 8), torch.zeros(2, 4, 40, 8)
    v = torch.eye(40).expand(2, 4, 40, 40)
    outs = []
    for attend in (imported_before, imported_before, fastattn.scaled_dot_product_attention):
        torch.manual_seed(5)
        with use():
            outs.append(attend(q, k, v, dropout_p=0.25))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    kept = outs[0] > 0
    torch.testing.assert_close(outs[0], kept / (40 * 0.75))
    assert abs(kept.double().mean() - 0.75) < 0.02


# ------------------------------------------------------------------------------------------------- what torch runs


class Labelled(Tensor):
    """A subclass that leaves everything to torch."""


def for_torch() -> dict[str, tuple[list[Any], dict[str, Any], str]]:
    """name -> (query, key, value), keywords, words of the reason."""
    q, k, v = qkv()
    strided = torch.nested.nested_tensor([torch.randn(3, 4, 8), torch.randn(3, 6, 8)])
    jagged = torch.nested.nested_tensor([torch.randn(4, 3, 8), torch.randn(6, 3, 8)], layout=torch.jagged)
    jagged = jagged.transpose(1, 2)
    bias = causal_lower_right(4, 6)
    return {
        "nested": ([strided] * 3, {}, "nested tensor"),
        "jagged": ([jagged] * 3, {}, "NestedTensor"),
        "subclass": ([q.as_subclass(Labelled), k, v], {}, "Labelled"),
        "causal bias": ([q[:, :, :4], k, v], {"attn_mask": bias}, "CausalBias"),
        "scale that is a tensor": ([q, k, v], {"scale": torch.tensor(0.3)}, "scale must be a number"),
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["nested", "jagged", "subclass", "causal bias", "scale that is a tensor"])
def test_runs_on_torch(name: str, fastattn_calls: list[None]) -> None:
    tensors, keywords, words = for_torch()[name]
    want = F.scaled_dot_product_attention(*tensors, **keywords)
    with use():
        found = F.scaled_dot_product_attention(*tensors, **keywords)
        explanation = explain(*tensors, **keywords)
    assert fastattn_calls == []
    assert type(found) is type(want)
    pairs = zip(found.unbind(), want.unbind(), strict=True) if found.is_nested else [(found, want)]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert explanation.runs_on == "torch"
    assert words in str(explanation)


def test_forward_mode_is_torchs(fastattn_calls: list[None]) -> None:
    q, k, v = qkv()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, k, v), (q,), (q,))
        with use():
            found = torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, k, v), (q,), (q,))
    assert fastattn_calls == []
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_where_fastattn_has_only_its_reference(fastattn_calls: list[None], use_backends: Callable[..., None]) -> None:
    q, k, v = qkv()
    want = F.scaled_dot_product_attention(q, k, v)
    use_backends(ReferenceBackend())
    with use():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), want)
        explanation = explain(q, k, v)
    assert fastattn_calls == []
    assert explanation.reason is not None
    assert "only its reference" in explanation.reason
    assert explanation.report is not None
    assert explanation.report.backend == "reference"


@pytest.mark.parametrize(
    "change",
    [
        {"value": torch.zeros(2, 3, 6, 8, dtype=torch.float64)},
        {"key": torch.zeros(2, 3, 6, 5)},
        {"attn_mask": torch.zeros(6, 6, dtype=torch.int64)},
        {"attn_mask": torch.zeros(6, 5)},
        {"dropout_p": 2.0},
        {"query": None},
    ],
)
def test_errors_are_torchs(change: dict[str, Any]) -> None:
    q, k, v = qkv()
    given = {"query": q, "key": k, "value": v, **change}
    with pytest.raises((RuntimeError, TypeError, ValueError)) as want:
        F.scaled_dot_product_attention(**given)
    with use(), pytest.raises(want.type) as found:
        F.scaled_dot_product_attention(**given)
    assert str(found.value) == str(want.value)
    explanation = explain(**given)
    assert explanation.runs_on == "torch"
    assert next(iter(change)) in str(explanation)


def test_a_module_that_names_torch_keeps_it(fastattn_calls: list[None]) -> None:
    x = torch.randn(2, 6, 24)
    module = fnn.MultiheadAttention(24, 3, batch_first=True, backend="torch")
    want = module(x, x, x, need_weights=False)[0]
    with use():
        assert torch.equal(module(x, x, x, need_weights=False)[0], want)
    assert fastattn_calls == []


# -------------------------------------------------------------------------------------------------------- the switch


def on() -> bool:
    q, k, v = qkv()
    return explain(q, k, v).active


def test_switch() -> None:
    assert not on()
    use()
    try:
        assert on()
        with use(False):
            assert not on()
            with use():
                assert on()
            assert not on()
        assert on()
        with use():
            assert on()
        assert on()
    finally:
        use(False)
    assert not on()
    use(False)
    assert not on()


def test_exceptions_end_it() -> None:
    with pytest.raises(KeyError), use(), use(False), use():
        raise KeyError
    assert not on()


def test_enabled_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="enabled must be a bool, got str 'yes'"):
        use("yes")  # type: ignore[arg-type]


def test_other_modes_come_and_go(fastattn_calls: list[None]) -> None:
    class Counting(torch.overrides.TorchFunctionMode):
        count = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is imported_before
            return func(*args, **(kwargs or {}))

    q, k, v = qkv()
    counting = Counting()
    with counting:
        use()
    with torch.device("cpu"):
        F.scaled_dot_product_attention(q, k, v)
    torch.set_default_device("cpu")
    try:
        with use(False), use():
            F.scaled_dot_product_attention(q, k, v)
    finally:
        torch.set_default_device(None)
    with counting:
        F.scaled_dot_product_attention(q, k, v)
        use(False)
        F.scaled_dot_product_attention(q, k, v)
    assert counting.count == 2
    assert len(fastattn_calls) == 3


def test_devices_come_and_go() -> None:
    """Blocks of torch.device pop the top of the stack, the default device expects itself at the bottom."""
    with use(), torch.device("meta"), use(False):
        assert not on()
    with torch.device("meta"):
        use()
    assert torch.overrides._get_current_function_mode_stack() == [switch._mode]
    torch.set_default_device("meta")
    with use(False), torch.device("cpu"), use():
        pass
    torch.set_default_device(None)
    assert torch.overrides._get_current_function_mode_stack() == [switch._mode]
    use(False)


def test_it_counts_for_its_thread() -> None:
    found: list[bool] = []
    with use():
        thread = threading.Thread(target=lambda: found.append(on()))
        thread.start()
        thread.join()
        assert on()
    assert found == [False]


def test_explanation_says_which_backend() -> None:
    explanation = explain(*qkv(), is_causal=True)
    assert (explanation.runs_on, explanation.reason, explanation.active) == ("fastattn", None, False)
    assert explanation.report is not None
    assert explanation.report.backend == fastattn.available_backends()[0]
    assert "would run on fastattn" in str(explanation)
    assert "use() is not active in this thread" in str(explanation)
    with use():
        assert "runs on fastattn" in str(explain(*qkv()))


# ----------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operators(function: Callable[..., Any], *args: Any) -> tuple[Any, set[str]]:
    """The result of the compiled function, and what its graph calls after the tracers' last look."""
    names: set[str] = set()

    def collect(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiler = aot_autograd(fw_compiler=collect)
    return torch.compile(function, fullgraph=True, backend=compiler)(*args), names


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_follows_the_switch(fastattn_calls: list[None]) -> None:
    q, k, v = qkv()
    run = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True).sin(),
        fullgraph=True,
        backend="aot_eager",
    )
    want = run(q, k, v)
    assert fastattn_calls == []
    with use():
        found = run(q, k, v)
        traced = len(fastattn_calls)
        assert traced > 0
        assert torch.equal(run(q, k, v), found)
        assert torch.equal(found, F.scaled_dot_product_attention(q, k, v, is_causal=True).sin())
    assert torch.equal(run(q, k, v), want)
    torch.testing.assert_close(found, want)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("training", [True, False])
def test_compiled_encoder(training: bool) -> None:
    model, x = encoder().train(training), torch.randn(2, 6, 24, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return model(x, src_key_padding_mask=PADDING)

    with use():
        found, names = operators(run, x)
        want = run(x)
    assert "fastattn.forward.default" in names
    assert not any("scaled_dot_product" in name for name in names)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (found, want)))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("inner", [True, False])
def test_switch_inside_a_compiled_function(inner: bool) -> None:
    q, k, v = qkv()

    def run(q: Tensor) -> Tensor:
        with use(inner):
            return F.scaled_dot_product_attention(q, k, v)

    with use(not inner):
        found, names = operators(run, q)
    assert ("fastattn.forward.default" in names) == inner
    assert any("scaled_dot_product" in name for name in names) != inner
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_call_for_torch() -> None:
    q, k, v = qkv()
    with use():
        found, names = operators(lambda *x: F.scaled_dot_product_attention(*x, scale=1e31), q * 1e-31, k, v)
    assert not any(name.startswith("fastattn") for name in names)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q * 1e-31, k, v, scale=1e31))


@pytest.mark.usefixtures("fresh_compiler")
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_once_for_all_lengths() -> None:
    run = torch.compile(
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    with use():
        for batch, rows, keys in ((3, 5, 7), (2, 9, 11), (6, 17, 40)):
            q, (k, v) = torch.randn(batch, 4, rows, 8), torch.randn(2, batch, 4, keys, 8)
            mask = torch.rand(batch, 1, rows, keys) < 0.7
            assert torch.equal(run(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))


def test_a_block_can_be_entered_again() -> None:
    q = torch.randn(1, 1, 4, 8)
    on, off = use(), use(False)
    for _ in range(2):
        with on:
            assert explain(q, q, q).active
            with off:
                assert not explain(q, q, q).active
            assert explain(q, q, q).active
        assert not explain(q, q, q).active
