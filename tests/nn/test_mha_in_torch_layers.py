"""Our attention inside torch's own transformer layers, whose shortcuts in evaluation would bypass it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastattn.nn import MultiheadAttention, RotaryEmbedding, replace_attention

E, H = 16, 4

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[MultiheadAttention]:
    """The modules whose forward ran. Hooks would not do: torch's shortcut steps aside for them."""
    seen: list[MultiheadAttention] = []
    forward = MultiheadAttention.forward

    def counted(self: MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MultiheadAttention, "forward", counted)
    return seen


def make_encoder(**layer: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.0, **layer}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, **options), 2).eval()


def padding_mask() -> Tensor:
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    padding[2, 1:] = True
    return padding


@pytest.mark.parametrize("layer", [{}, {"norm_first": True}, {"batch_first": False}, {"activation": "gelu"}], ids=str)
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "causal and padding", "float padding"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_encoder_after_replacement(layer: dict[str, Any], masks: str, grad: bool, calls: list[Any]) -> None:
    """In evaluation torch's encoder nests padded input, and its layers call one fused operator."""
    theirs = make_encoder(**layer)
    ours = replace_attention(copy.deepcopy(theirs))
    assert ours.use_nested_tensor == theirs.use_nested_tensor
    x = torch.randn(3, 6, E)
    call: dict[str, Any] = {}
    padding = padding_mask()
    if "padding" in masks:
        call["src_key_padding_mask"] = padding
        if "float" in masks:
            call["src_key_padding_mask"] = torch.zeros(3, 6).masked_fill(padding, -torch.inf)
    if "causal" in masks:
        call["mask"] = nn.Transformer.generate_square_subsequent_mask(6)
        call["is_causal"] = True
        if "padding" in masks:
            call["mask"] = call["mask"] != 0
    if not layer.get("batch_first", True):
        x = x.transpose(0, 1)
    with torch.set_grad_enabled(grad):
        expected, found = theirs(x, **call), ours(x, **call)
    assert calls.count(ours.layers[0].self_attn) == calls.count(ours.layers[1].self_attn) > 0
    real = ~padding if "padding" in masks else torch.ones(3, 6, dtype=torch.bool)
    real = real if layer.get("batch_first", True) else real.T
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


def test_nested_padding_stays_zero_as_in_torch(calls: list[Any]) -> None:
    theirs = make_encoder()
    ours = replace_attention(copy.deepcopy(theirs))
    x, padding = torch.randn(3, 6, E), padding_mask()
    with torch.no_grad():
        torch.testing.assert_close(
            ours(x, src_key_padding_mask=padding),
            theirs(x, src_key_padding_mask=padding),
            rtol=1e-5,
            atol=1e-5,
        )
    assert len(calls) == 4  # per layer once with the nested, once with the padded tensor


FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": (1, 0)},
    "softcap": {"softcap": 0.5},
    "alibi": {"alibi": True},
    "rotary": {"rotary": RotaryEmbedding(E // H)},
    "sinks": {"sinks": True},
    "qk_norm": {"qk_norm": True},
    "scale": {"scale": 3.0},
    "num_kv_heads": {"num_kv_heads": 2},
}


@pytest.mark.parametrize("given", ["dense", "padded", "nested", "inference_mode", "compiled"])
@pytest.mark.parametrize("feature", FEATURES)
def test_evaluation_computes_with_the_features(feature: str, given: str, calls: list[Any]) -> None:
    """torch's fused kernel has none of them; the flag that it goes by is true to its name all the same."""
    torch.manual_seed(0)
    attention = MultiheadAttention(E, H, batch_first=True, **FEATURES[feature])
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    layer.self_attn = attention
    x = torch.randn(3, 6, E)
    real = ~padding_mask() if given == "padded" else torch.ones(3, 6, dtype=torch.bool)
    padding = None if given != "padded" else padding_mask()
    y = layer.norm1(x + attention(x, x, x, padding, need_weights=False)[0])
    expected = layer.norm2(y + layer.linear2(layer.linear1(y).relu()))
    layer.eval()
    calls.clear()
    source = torch.nested.as_nested_tensor(list(x)) if given == "nested" else x
    run = torch.compile(layer, backend="eager") if given == "compiled" else layer
    with torch.inference_mode() if given == "inference_mode" else torch.no_grad():
        found = run(source, src_key_padding_mask=padding)
    found = torch.stack(found.unbind()) if given == "nested" else found
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
    if given != "compiled":
        assert calls


@pytest.mark.parametrize("replaced", [False, True])
def test_exported_layer_calls_our_operator(replaced: bool) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True).eval()
    if replaced:
        replace_attention(layer)
    else:
        layer.self_attn = MultiheadAttention(E, H, batch_first=True).eval()
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(3, 6, E),))
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("fastattn" in target for target in targets)
    assert not any("_transformer_encoder_layer_fwd" in target for target in targets)


@pytest.mark.parametrize("padded", [False, True])
def test_extras_are_not_lost_in_evaluation(padded: bool, calls: list[Any]) -> None:
    model = replace_attention(make_encoder(), window=(1, 1), alibi=True)
    x = torch.randn(3, 6, E)
    call = {"src_key_padding_mask": padding_mask()} if padded else {}
    expected = model.train()(x, **call)  # dropout is 0: training takes the long way
    calls.clear()
    with torch.no_grad():
        found = model.eval()(x, **call)
    assert len(calls) >= 2
    real = ~padding_mask() if padded else torch.ones(3, 6, dtype=torch.bool)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        full = make_encoder()(x, **call)
    assert (full[real] - found[real]).abs().max() > 1e-2


@pytest.mark.parametrize("padded", [False, True])
def test_layer_built_around_our_module(padded: bool, calls: list[Any]) -> None:
    theirs = make_encoder()
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    layer.self_attn = MultiheadAttention(E, H, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = nn.TransformerEncoder(layer, 2).eval()
    assert ours.use_nested_tensor
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(3, 6, E)
    call = {"src_key_padding_mask": padding_mask()} if padded else {}
    with torch.no_grad():
        expected, found = theirs(x, **call), ours(x, **call)
    assert len(calls) == (4 if padded else 2)  # a nested tensor takes a second call, with the padded one
    real = ~padding_mask() if padded else torch.ones(3, 6, dtype=torch.bool)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


def test_replacing_the_layer_attribute_of_an_existing_encoder(calls: list[Any]) -> None:
    theirs = make_encoder()
    ours = copy.deepcopy(theirs)
    for layer in ours.layers:
        attention = MultiheadAttention(E, H, batch_first=True)
        attention.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = attention.eval()
    x, padding = torch.randn(3, 6, E), padding_mask()
    with torch.no_grad():
        expected, found = theirs(x, src_key_padding_mask=padding), ours(x, src_key_padding_mask=padding)
    assert calls
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_full_torch_transformer(batch_first: bool, calls: list[Any]) -> None:
    torch.manual_seed(0)
    theirs = nn.Transformer(E, H, 2, 2, 32, dropout=0.0, batch_first=batch_first)
    ours = replace_attention(copy.deepcopy(theirs))
    source, target = torch.randn(3, 6, E), torch.randn(3, 5, E)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    call = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "src_key_padding_mask": torch.zeros(3, 6).masked_fill(padding_mask(), -torch.inf),
        "memory_key_padding_mask": torch.zeros(3, 6).masked_fill(padding_mask(), -torch.inf),
    }
    for model in (theirs, ours):
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(source, target, **call), theirs(source, target, **call), rtol=1e-5, atol=1e-5)
    assert {id(m) for m in calls} == {id(m) for m in ours.modules() if isinstance(m, MultiheadAttention)}

    losses = []
    for model in (theirs, ours):
        model.train()
        out = model(source, target, **call)
        out.square().sum().backward()
        losses.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)


def test_nested_tensors_directly() -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(E, H, batch_first=True, window=(2, 0))
    rows = [torch.randn(n, E) for n in (4, 1, 6)]
    query = torch.nested.nested_tensor(rows)
    memory = torch.nested.nested_tensor([torch.randn(n, E) for n in (3, 5, 2)])
    for key in (query, memory):
        for causal in (False, True):
            out, weights = module(query, key, key, need_weights=False, is_causal=causal)
            assert weights is None
            assert out.is_nested
            for found, row, other in zip(out.unbind(), rows, key.unbind(), strict=True):
                expected, _ = module(row[None], other[None], other[None], need_weights=False, is_causal=causal)
                torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clear", ["clear", "assign"])
@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "script"])
def test_clearing_hooks_does_not_bring_the_fused_kernel_back(clear: str, scripted: bool) -> None:
    """As libraries do before they save or compile a model."""
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True)
    layer.self_attn = MultiheadAttention(E, H, batch_first=True, alibi=True)
    layer.eval()
    x = torch.randn(2, 7, E)
    expected = layer(x).detach()
    for module in layer.modules():
        for hooks in ("_forward_pre_hooks", "_forward_hooks"):
            if clear == "clear":
                getattr(module, hooks).clear()
            else:
                setattr(module, hooks, OrderedDict())
    with torch.no_grad():
        for model in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close((torch.jit.script(model) if scripted else model)(x), expected)
