"""What reads modules instead of running them: torch.jit.script, torch.jit.trace, torch.onnx.export, torch.fx.

torch's own modules pass all of them (torch.fx: inside a model), so ours must.
"""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastattn.nn as fnn
from fastattn.nn import MultiheadAttention, RotaryEmbedding, replace_attention

E, H = 16, 4

pytestmark = [
    pytest.mark.filterwarnings("ignore:`?torch.jit"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def x(seqlen: int = 5, width: int = E) -> Tensor:
    return torch.linspace(-2, 2, 2 * seqlen * width).view(2, width, seqlen).transpose(1, 2).sin()


def padding(seqlen: int = 5) -> Tensor:
    mask = torch.zeros(2, seqlen, dtype=torch.bool)
    mask[1, 3:] = True
    return mask


class SelfAttention(nn.Module):
    """A user's model around an attention."""

    def __init__(self, attention: nn.Module, is_causal: bool = False) -> None:
        super().__init__()
        self.attention, self.is_causal = attention, is_causal

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out, _ = self.attention(x, x, x, padding, need_weights=False, is_causal=self.is_causal)
        return x + out


def attention(is_causal: bool = False, **options: Any) -> Callable[[], nn.Module]:
    return lambda: SelfAttention(MultiheadAttention(E, H, batch_first=True, **options), is_causal)


def replaced(build: Callable[[], nn.Module], **features: Any) -> Callable[[], nn.Module]:
    return lambda: replace_attention(build(), **features)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 24, batch_first=True), 2)


def ids(seqlen: int = 6) -> Tensor:
    return torch.arange(2 * seqlen).view(2, seqlen) % 11


def real(seqlen: int = 6) -> Tensor:
    mask = torch.ones(2, seqlen, dtype=torch.int64)
    mask[1, 4:] = 0
    return mask


EVERYTHING: dict[str, Any] = {
    "num_kv_heads": 2,
    "window": (3, 1),
    "softcap": 5,
    "alibi": True,
    "sinks": True,
    "qk_norm": True,
    "scale": 0.4,
}
LAYER = {"d_model": E, "nhead": H, "dim_feedforward": 24, "batch_first": True}

Inputs = Callable[[int], tuple[Tensor, ...]]  # of a sequence length
CASES: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "attention": (attention(), lambda n: (x(n),)),
    "padding": (attention(), lambda n: (x(n), padding(n))),
    "causal": (attention(is_causal=True), lambda n: (x(n),)),
    "causal and padding": (attention(is_causal=True), lambda n: (x(n), padding(n))),
    "kdim": (attention(kdim=E, vdim=E, bias=False), lambda n: (x(n),)),
    "odd heads": (lambda: SelfAttention(MultiheadAttention(E, 1, batch_first=True)), lambda n: (x(n),)),
    "added keys": (attention(add_bias_kv=True, add_zero_attn=True, window=(1, 0)), lambda n: (x(n), padding(n))),
    **{
        name: (attention(**{name: value}), lambda n: (x(n), padding(n)))  # one feature at a time
        for name, value in EVERYTHING.items()
    },
    "everything": (
        attention(True, **EVERYTHING, rotary=RotaryEmbedding(4), add_bias_kv=True, add_zero_attn=True),
        lambda n: (x(n), padding(n)),
    ),
    "open window": (attention(window=(None, None)), lambda n: (x(n),)),
    "causal with a half open window": (attention(True, window=(2, None)), lambda n: (x(n),)),
    "window as a list": (attention(window=[2, 1]), lambda n: (x(n),)),
    "rotary of a part, interleaved": (
        attention(rotary=RotaryEmbedding(4, interleaved=True, rotary_dim=2), window=(None, 1)),
        lambda n: (x(n),),
    ),
    "not batch_first": (
        lambda: SelfAttention(MultiheadAttention(E, H, window=(2, 0), add_bias_kv=True)),
        lambda n: (x(n).transpose(0, 1).contiguous(),),
    ),
    "replaced": (replaced(lambda: SelfAttention(nn.MultiheadAttention(E, H, batch_first=True))), lambda n: (x(n),)),
    "copied": (lambda: copy.deepcopy(attention(window=(1, 0))()), lambda n: (x(n),)),
    "encoder layer": (replaced(lambda: nn.TransformerEncoderLayer(**LAYER)), lambda n: (x(n),)),
    "encoder layer with a window": (
        replaced(lambda: nn.TransformerEncoderLayer(**LAYER), window=(1, 0), softcap=0.5),
        lambda n: (x(n),),
    ),
    "encoder": (replaced(encoder, alibi=True), lambda n: (x(n),)),
    "decoder layer": (replaced(lambda: nn.TransformerDecoderLayer(**LAYER)), lambda n: (x(n), x(n + 1))),
    "torch's transformer": (
        replaced(lambda: nn.Transformer(E, H, 1, 1, 24, batch_first=True)),
        lambda n: (x(n), x(n + 1)),
    ),
    **{
        f"language model, {kind}": (
            lambda kind=kind: fnn.TransformerLM(11, E, 24, H, 2, positional=kind, num_kv_heads=2),
            lambda n: (ids(n), real(n)),
        )
        for kind in ("rotary", "alibi", "learned", "sinusoidal")
    },
    "transformer": (lambda: fnn.Transformer(11, E, 24, H, 1, positional="rotary"), lambda n: (ids(n), real(n))),
    "transformer, three inputs": (
        lambda: fnn.Transformer(11, E, 24, H, 1, positional="learned", window=(2, 2)),
        lambda n: (ids(n), real(n), ids(n + 1)),
    ),
    "rotary embedding": (lambda: RotaryEmbedding(E), lambda n: (x(n)[:, None],)),
    "learned encoding": (lambda: fnn.LearnedPositionalEncoding(20, E), lambda n: (x(n),)),
    "sinusoidal encoding": (lambda: fnn.SinusoidalPositionalEncoding(E), lambda n: (x(n),)),
    "encoding with positions": (
        lambda: fnn.SinusoidalPositionalEncoding(E),
        lambda n: (x(n), torch.arange(2 * n).view(2, n)),
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def check(name: str, run: Callable[..., Any], module: nn.Module, n: int) -> None:
    """run, in place of the module, on sequences of length n. Logits of padding mean nothing."""
    inputs = CASES[name][1](n)
    with torch.no_grad():
        expected, found = module(*inputs), torch.as_tensor(run(*inputs))
    shown = torch.ones(expected.shape[:2], dtype=torch.bool)
    if len(inputs) == 2 and inputs[1].dtype == torch.int64 and expected.shape[-1] == 11:
        shown = inputs[1].bool()
    torch.testing.assert_close(found[shown], expected[shown], rtol=1e-5, atol=2e-6)


def has_our_operators(graph: Any) -> bool:
    return "fastattn::" in str(graph)


@every_case
def test_script(name: str) -> None:
    module = CASES[name][0]().eval()
    scripted = torch.jit.script(module)
    check(name, scripted, module, 6)
    check(name, scripted, module, 9)
    kept = io.BytesIO()
    torch.jit.save(scripted, kept)
    kept.seek(0)
    check(name, torch.jit.load(kept), module, 6)
    assert not has_our_operators(scripted.inlined_graph)


@every_case
def test_trace(name: str) -> None:
    module = CASES[name][0]().eval()
    with torch.no_grad():
        traced = torch.jit.trace(module, CASES[name][1](6))
    assert not has_our_operators(traced.inlined_graph)
    check(name, traced, module, 6)
    if "torch's" not in name:  # which fixes its number of queries
        check(name, traced, module, 9)


@pytest.fixture
def quiet() -> Iterator[None]:
    """The exporter warns of packages that are missing."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
@every_case
@pytest.mark.usefixtures("quiet")
def test_onnx(name: str, dynamo: bool) -> None:
    for package in ("onnx", "onnxscript") if dynamo else ("onnx",):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    module = CASES[name][0]().eval()
    inputs = CASES[name][1](6)
    axes: dict[str, Any] = {}
    names = [f"input{i}" for i in range(len(inputs))]
    if not dynamo:
        sizes = {given: range(tensor.ndim - (tensor.ndim > 2)) for given, tensor in zip(names, inputs, strict=True)}
        axes = {"dynamic_axes": {given: {i: f"{given}_{i}" for i in sizes[given]} for given in names}}
        axes["opset_version"] = 18
    model = io.BytesIO()
    torch.onnx.export(module, inputs, model, dynamo=dynamo, input_names=names, **axes)
    session = runtime.InferenceSession(model.getvalue())

    def run(*inputs: Tensor) -> np.ndarray:
        return session.run(None, {given: value.numpy() for given, value in zip(names, inputs, strict=True)})[0]

    check(name, run, module, 6)
    if not dynamo and "torch's" not in name:  # dynamo has been told of no size that may change
        check(name, run, module, 9)


@every_case
def test_fx(name: str) -> None:
    build, inputs = CASES[name]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build()

        def forward(self, first: Tensor, second: Tensor | None = None, third: Tensor | None = None) -> Tensor:
            given = (first, second, third)[: len(inputs(6))]
            return self.inner(*given) + 1

    model = Model().eval()
    traced = torch.fx.symbolic_trace(model)
    assert any(node.op == "call_module" for node in traced.graph.nodes)
    check(name, traced, model, 6)
    check(name, torch.fx.symbolic_trace(traced), model, 9)


def test_fx_node_is_the_module_itself() -> None:
    """Its kernels and its training go on in the traced model."""
    model = SelfAttention(replace_attention(nn.MultiheadAttention(E, H, batch_first=True), window=(1, 0)))
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["attention"]
    assert traced.attention is model.attention
    traced(x()).sum().backward()
    assert model.attention.in_proj_weight.grad is not None


def test_fx_with_a_proxy_among_the_masks_only() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = MultiheadAttention(E, H, batch_first=True)

        def forward(self, mask: Tensor) -> Tensor:
            query = torch.ones(2, 5, E)
            return self.attention(query, query, query, key_padding_mask=mask)[0]

    model = Model()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(padding()), model(padding()))


@pytest.mark.parametrize(
    "module", [MultiheadAttention(E, H), fnn.TransformerLM(11, E, 24, H, 1), RotaryEmbedding(4)], ids=lambda m: type(m)
)
def test_fx_of_the_module_itself(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"torch.fx traces a model that contains a {type(module).__name__}"):
        torch.fx.symbolic_trace(module)


def test_fx_by_a_tracer_that_knows_no_modules() -> None:
    tracer = torch.fx.proxy.GraphAppendingTracer(torch.fx.Graph())
    proxy = torch.fx.Proxy(tracer.graph.placeholder("x"), tracer)
    with pytest.raises(TypeError, match=r"MultiheadAttention can be traced by a torch\.fx\.Tracer, .* got a Graph"):
        MultiheadAttention(E, H)(proxy, proxy, proxy)


@pytest.mark.parametrize(
    "record", [torch.jit.script, lambda m: torch.jit.trace(m, (x(), padding()))], ids=["script", "trace"]
)
def test_recording_leaves_the_module_as_it_is(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attention(**EVERYTHING)()
    inner = model.attention
    record(model)
    called = []
    monkeypatch.setattr(MultiheadAttention, "_forward", lambda *args: called.append(args) or (args[1], None))
    model(x())
    assert model.attention is inner
    assert len(called) == 1


def test_scripted_gradients() -> None:
    module = attention(True, **EVERYTHING, rotary=RotaryEmbedding(4), add_bias_kv=True)()
    gradients = []
    for run in (module, torch.jit.script(module)):
        module.zero_grad()
        given = x().requires_grad_()
        run(given, padding()).square().sum().backward()
        gradients.append([given.grad, *(p.grad.clone() for p in module.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("mask", ["bool 2", "bool 3", "float 2", "float 3", None])
@pytest.mark.parametrize("pad", ["bool", "float", None])
def test_scripted_masks_and_weights(mask: str | None, pad: str | None, average: bool) -> None:
    """Queries that see no key too: they give 0, as ours do, with gradients that are 0."""
    module = MultiheadAttention(E, H, window=(3, 2), sinks=average)
    call: dict[str, Any] = {"average_attn_weights": average}
    if mask is not None:
        pattern = torch.rand(2 * H if "3" in mask else 1, 5, 7) < 0.3
        pattern[..., 2, :] = True
        pattern = pattern if "3" in mask else pattern[0]
        call["attn_mask"] = pattern if "bool" in mask else torch.zeros(pattern.shape).masked_fill(pattern, -torch.inf)
    if pad is not None:
        call["key_padding_mask"] = (
            padding(7) if pad == "bool" else torch.zeros(2, 7).masked_fill(padding(7), -torch.inf)
        )
    query, key = x(5).transpose(0, 1).requires_grad_(), x(7).transpose(0, 1)
    results = []
    for run in (module, torch.jit.script(module)):
        out, weights = run(query, key, key, **call)
        (gradient,) = torch.autograd.grad(out.square().sum(), query)
        results.append((out, weights, gradient))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    out, _ = torch.jit.script(module)(query[:, 0], key[:, 0], key[:, 0])  # unbatched
    torch.testing.assert_close(out, module(query[:, 0], key[:, 0], key[:, 0])[0], rtol=1e-5, atol=1e-5)


def test_scripted_dropout_is_for_training() -> None:
    module = MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    scripted = torch.jit.script(module)
    _, weights = scripted(x(), x(), x(), average_attn_weights=False)
    assert 0.3 < (weights == 0).float().mean() < 0.7
    torch.testing.assert_close(weights @ torch.ones(5, 1), weights.sum(-1, keepdim=True))
    torch.testing.assert_close(scripted.eval()(x(), x(), x()), module.eval()(x(), x(), x()), rtol=1e-5, atol=1e-5)


def test_scripted_encoder_with_nested_padding() -> None:
    """In evaluation torch's encoder hands NestedTensors to its layers, whose fused kernel has no window."""
    module = replace_attention(encoder(), window=(1, 0), alibi=True).eval()
    with torch.no_grad():
        expected = module(x(), src_key_padding_mask=padding())
        found = torch.jit.script(module)(x(), src_key_padding_mask=padding())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_whatever_stands_for_a_norm_is_called() -> None:
    module = attention(qk_norm=True)()
    module.attention.q_norm, module.attention.k_norm = nn.LayerNorm(E // H), nn.Identity()
    for run in (torch.jit.script(module), torch.jit.trace(module, (x(),))):
        torch.testing.assert_close(run(x()), module(x()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scripted_dtypes(dtype: torch.dtype) -> None:
    module = attention(**EVERYTHING, rotary=RotaryEmbedding(4))().to(dtype).eval()
    found, expected = torch.jit.script(module)(x().to(dtype)), module(x().to(dtype))
    assert found.dtype == dtype
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-9}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_no_cache_while_tracing() -> None:
    module = MultiheadAttention(E, H, batch_first=True).eval()
    cache = module.new_cache(2, 8)

    def step(x: Tensor) -> Tensor:
        return module(x, x, x, need_weights=False, kv_cache=cache)[0]

    with torch.no_grad(), pytest.raises(ValueError, match="kv_cache must be None where the module is traced"):
        torch.jit.trace(step, (x(),))
