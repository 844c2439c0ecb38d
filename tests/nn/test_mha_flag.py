"""Code that reads torch's module rather than calls it, by `_qkv_same_embed_dim` and the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.nn import MultiheadAttention, replace_attention

E, H = 16, 4


@pytest.mark.parametrize("options", [{}, {"kdim": E, "vdim": E}, {"kdim": 8}, {"vdim": 6}, {"bias": False}], ids=str)
def test_flag_is_torchs(options: dict[str, Any]) -> None:
    theirs = nn.MultiheadAttention(E, H, **options)
    ours = MultiheadAttention(E, H, **options)
    assert ours._qkv_same_embed_dim is theirs._qkv_same_embed_dim is (ours.in_proj_weight is not None)
    assert replace_attention(theirs)._qkv_same_embed_dim is ours._qkv_same_embed_dim


def test_flag_with_fewer_key_value_heads() -> None:
    """Their in_proj_weight is not the (3 * embed_dim, embed_dim) that readers of the flag expect."""
    assert not MultiheadAttention(E, H, num_kv_heads=2)._qkv_same_embed_dim


@pytest.mark.parametrize("options", [{}, {"kdim": 8, "vdim": 6}, {"add_bias_kv": True, "bias": False}], ids=str)
def test_torchs_function_with_our_weights(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(E, H, **options)
    query, key, value = torch.randn(5, 3, E), torch.randn(7, 3, module.kdim), torch.randn(7, 3, module.vdim)
    separate: dict[str, Any] = {}
    if not module._qkv_same_embed_dim:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        separate = {"use_separate_proj_weight": True, **{name: getattr(module, name) for name in names}}
    expected, weights = F.multi_head_attention_forward(
        *(query, key, value, E, H, module.in_proj_weight, module.in_proj_bias, module.bias_k, module.bias_v),
        *(module.add_zero_attn, module.dropout, module.out_proj.weight, module.out_proj.bias),
        **separate,
    )
    found = module(query, key, value)
    torch.testing.assert_close(found, (expected, weights), rtol=1e-5, atol=1e-5)


class LowRank(nn.Module):
    """What adapters such as PEFT's do: they put plain tensors in the place of the weights for one call."""

    def __init__(self, base: nn.MultiheadAttention) -> None:
        super().__init__()
        assert base._qkv_same_embed_dim
        assert isinstance(base.out_proj, nn.Linear)
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Parameter(0.1 * torch.randn(2, E)), nn.Parameter(torch.randn(3 * E, 2))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weight = self.base.in_proj_weight
        del self.base.in_proj_weight
        self.base.in_proj_weight = weight.data + self.b @ self.a
        try:
            return self.base(*args, **kwargs)
        finally:
            del self.base.in_proj_weight
            self.base.register_parameter("in_proj_weight", weight)


def adapted(kind: type[nn.MultiheadAttention], wrap: Any) -> tuple[Tensor, list[Tensor], nn.Module]:
    """Loss, gradients of the adapter, and the model, of one step."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": kind(E, H, batch_first=True)})
    torch.manual_seed(1)
    model = wrap(model)
    x = torch.randn(2, 5, E)
    loss = model["attention"](x, x, x)[0].square().sum()
    loss.backward()
    return loss, [p.grad for p in model.parameters() if p.requires_grad], model


def test_low_rank_adapter_trains() -> None:
    def wrap(model: nn.ModuleDict) -> nn.ModuleDict:
        return nn.ModuleDict({"attention": LowRank(model["attention"])})

    expected, found = adapted(nn.MultiheadAttention, wrap), adapted(MultiheadAttention, wrap)
    assert len(found[1]) == 2
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-4)


def test_peft_trains_and_merges() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["attention"], r=4, init_lora_weights=False)

    def wrap(model: nn.ModuleDict) -> nn.ModuleDict:
        return peft.inject_adapter_in_model(config, model)

    expected, found = adapted(nn.MultiheadAttention, wrap), adapted(MultiheadAttention, wrap)
    assert len(found[1]) == 4
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-4)
    attention = found[2]["attention"]
    x = torch.randn(2, 5, E)
    before, _ = attention(x, x, x)
    merged = attention.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    assert type(merged) is MultiheadAttention
    torch.testing.assert_close(merged(x, x, x)[0], before, rtol=1e-5, atol=1e-5)
