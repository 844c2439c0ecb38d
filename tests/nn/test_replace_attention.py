"""replace_attention changes what a module computes with, and nothing else about it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastattn.nn import MultiheadAttention, RotaryEmbedding, TransformerLM, replace_attention

E, H = 16, 4


class Model(nn.Module):
    """Two attentions, one of them under two names, in a container."""

    def __init__(self, **attention: Any) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(E, H, **attention)
        self.rest = nn.ModuleDict({"second": nn.MultiheadAttention(E, H, **attention), "again": self.first})

    def forward(self, x: Tensor) -> Tensor:
        for attention in (self.first, self.rest["second"], self.rest["again"]):
            x = x + attention(x, x, x, need_weights=False)[0]
        return x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": E, "vdim": E, "batch_first": True},
        {"add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=str,
)
def test_computes_the_same(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Model(**options)
    x = torch.randn(3, 5, E)
    expected = model(x)
    assert replace_attention(model) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_keeps_everything_else() -> None:
    model = Model(dropout=0.25, dtype=torch.float64)
    model.first.in_proj_bias.requires_grad_(False)
    model.rest["second"].eval()
    model.first.label = "a user's attribute"
    before, names = dict(model.named_parameters()), list(model.state_dict())
    first = model.first
    replace_attention(model)
    assert [type(m) for m in (model.first, model.rest["second"])] == [MultiheadAttention] * 2
    assert model.first is first
    assert model.rest["again"] is first
    after = dict(model.named_parameters())
    assert list(model.state_dict()) == names
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert not model.first.in_proj_bias.requires_grad
    assert (model.first.training, model.rest["second"].training) == (True, False)
    assert model.first.dropout == 0.25
    assert model.first.out_proj.weight.dtype == torch.float64
    assert model.first.label == "a user's attribute"


def test_an_optimizer_made_before_goes_on_training() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(3, 5, E)
    replace_attention(model)
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_hooks_of_every_kind_go_on() -> None:
    model = nn.MultiheadAttention(E, H)
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.register_forward_hook(lambda *_, **__: seen.append("kwargs"), with_kwargs=True)
    model.register_forward_hook(lambda *_: seen.append("always"), always_call=True)
    model.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    model.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.register_state_dict_pre_hook(lambda *_: seen.append("state"))
    model._register_state_dict_hook(lambda *_: seen.append("state after"))
    model.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    model.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    replace_attention(model)
    x = torch.randn(5, 2, E, requires_grad=True)
    model(x, x, x)[0].sum().backward()
    model.load_state_dict(model.state_dict())
    expected = [
        "pre",
        "kwargs",
        "always",
        "backward pre",
        "backward",
        "state",
        "state after",
        "load",
        "loaded",
    ]
    assert seen == expected


def test_root_is_an_attention() -> None:
    root = nn.MultiheadAttention(E, H)
    new = replace_attention(root, window=(2, 0))
    assert new is root
    assert isinstance(new, MultiheadAttention)
    assert new.window == (2, 0)


def test_parametrized_modules_stay_parametrized() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, H)

    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 0.5 * weight

    parametrize.register_parametrization(module, "in_proj_weight", Half())
    nn.utils.parametrizations.weight_norm(module.out_proj)
    x = torch.randn(5, 2, E)
    expected, _ = module(x, x, x)
    parameters = dict(module.named_parameters())
    replace_attention(module)
    assert isinstance(module, MultiheadAttention)
    assert all(p is parameters[name] for name, p in module.named_parameters())
    torch.testing.assert_close(module(x, x, x)[0], expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        module.parametrizations.in_proj_weight.original.zero_()
    assert not torch.allclose(module(x, x, x)[0], expected)
    twin = copy.deepcopy(module)
    torch.testing.assert_close(twin(x, x, x)[0], module(x, x, x)[0])


def test_subclasses_only_when_asked_for() -> None:
    class Special(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("not ours to change")

    model = nn.ModuleList([Special(E, H), nn.MultiheadAttention(E, H)])
    replace_attention(model)
    assert type(model[0]) is Special
    assert type(model[1]) is MultiheadAttention
    replace_attention(model, include_subclasses=True)
    assert type(model[0]) is MultiheadAttention
    x = torch.randn(5, 2, E)
    model[0](x, x, x)


def test_extras_reach_the_modules() -> None:
    rotary = RotaryEmbedding(E // H)
    model = replace_attention(
        Model(dtype=torch.float64),
        window=(3, 0),
        softcap=5.0,
        alibi=True,
        rotary=rotary,
        sinks=True,
        qk_norm=True,
        scale=0.7,
        backend="reference",
    )
    for module in (model.first, model.rest["second"]):
        assert (module.window, module.softcap, module.scale, module.backend) == (
            (3, 0),
            5.0,
            0.7,
            "reference",
        )
        assert module.rotary is rotary
        assert module.alibi_slopes.shape == (H,)
        assert module.sinks.dtype == module.q_norm.weight.dtype == torch.float64
    x = torch.randn(3, 5, E, dtype=torch.float64)
    assert model(x).isfinite().all()


def test_device_is_kept() -> None:
    module = replace_attention(nn.MultiheadAttention(E, H, device="meta"), sinks=True, qk_norm=True, alibi=True)
    tensors = [*module.parameters(), *module.buffers()]
    assert len(tensors) == 7
    assert all(x.device.type == "meta" for x in [*tensors, module.alibi_slopes])


def test_twice_changes_nothing_more() -> None:
    model = replace_attention(Model(), window=(1, 0))
    first = model.first
    assert replace_attention(model) is model
    with pytest.raises(ValueError, match="options window, sinks would reach no module: every attention of the Model"):
        replace_attention(model, window=(2, 0), sinks=True)
    assert model.first is first
    assert first.sinks is None
    assert first.window == (1, 0)
    replace_attention(TransformerLM(5, 8, 8, 2, 1))


def test_refuses_and_leaves_the_model_alone() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        replace_attention([nn.MultiheadAttention(E, H)])
    with pytest.raises(ValueError, match=r"model must contain a torch\.nn\.MultiheadAttention, got a Linear"):
        replace_attention(nn.Linear(2, 2))
    model = Model()
    model.rest["second"].forward = lambda *_: None
    with pytest.raises(ValueError, match="forward was replaced on the instance"):
        replace_attention(model)
    assert type(model.first) is nn.MultiheadAttention
    model = Model()
    with pytest.raises(ValueError, match="rotary must have dim"):
        replace_attention(model, rotary=RotaryEmbedding(6))
    with pytest.raises(ValueError, match=r"backend must be .* got 'abacus'"):
        replace_attention(model, backend="abacus")
    assert type(model.first) is nn.MultiheadAttention
