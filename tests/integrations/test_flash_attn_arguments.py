"""Arguments of fastattn.integrations.flash_attn: the types that flash-attn converts, and what a wrong one is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastattn.integrations.flash_attn as fa

X = torch.zeros(2, 5, 4, 8)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)
I32 = torch.zeros(2, dtype=torch.int32)
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "func": (fa.flash_attn_func, {"q": X, "k": X, "v": X}),
    "kvpacked": (fa.flash_attn_kvpacked_func, {"q": X, "kv": torch.zeros(2, 5, 2, 4, 8)}),
    "qkvpacked": (fa.flash_attn_qkvpacked_func, {"qkv": torch.zeros(2, 5, 3, 4, 8)}),
    "varlen": (
        fa.flash_attn_varlen_func,
        {"q": X[0], "k": X[0], "v": X[0], "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 3, "max_seqlen_k": 3},
    ),
    "cache": (fa.flash_attn_with_kvcache, {"q": X, "k_cache": X, "v_cache": X, "cache_seqlens": 2}),
    "rotary": (fa.apply_rotary_emb, {"x": X, "cos": torch.zeros(5, 4), "sin": torch.zeros(5, 4)}),
    "unpad": (fa.unpad_input, {"hidden_states": X, "attention_mask": torch.ones(2, 5)}),
    "pad": (fa.pad_input, {"hidden_states": X[0], "indices": torch.arange(5), "batch": 2, "seqlen": 5}),
}


TABLES = ("rotary_cos", "rotary_sin")


@pytest.mark.parametrize(
    ("call", "change", "error", "words"),
    [
        ("func", {"q": None}, TypeError, ["q", "NoneType"]),
        ("func", {"q": X[0]}, ValueError, ["q", "(batch_size, seqlen_q, nheads, headdim)", "(5, 4, 8)"]),
        ("func", {"k": X[:1]}, ValueError, ["k", "(1, 5, 4, 8)", "(2, 5, 4, 8)"]),
        ("func", {"v": X[:, :3]}, ValueError, ["v", "(2, 3, 4", "(2, 5, 4"]),
        ("func", {"k": X[:, :, :3], "v": X[:, :, :3]}, ValueError, ["heads", "4 and 3"]),
        ("func", {"k": X.half()}, TypeError, ["k", "float16"]),
        ("func", {"window_size": (1,)}, TypeError, ["window_size", "(1,)"]),
        ("func", {"window_size": (None, 0)}, TypeError, ["window_size", "None"]),
        ("func", {"softcap": None}, TypeError, ["softcap", "NoneType"]),
        ("func", {"softmax_scale": "1"}, TypeError, ["softmax_scale", "'1'"]),
        ("func", {"window_size": torch.tensor([1.0, 2.0])}, TypeError, ["window_size", "tensor"]),
        ("func", {"window_size": 3}, TypeError, ["window_size", "3"]),
        ("func", {"window_size": (True, 1)}, TypeError, ["window_size", "True"]),
        ("func", {"causal": 2}, TypeError, ["causal", "int"]),
        ("func", {"causal": None}, TypeError, ["causal", "NoneType"]),
        ("func", {"causal": torch.ones(2)}, TypeError, ["causal", "Tensor"]),
        ("func", {"softmax_scale": torch.ones(1, requires_grad=True)}, TypeError, ["softmax_scale", "Tensor"]),
        ("func", {"dropout_p": None}, TypeError, ["dropout_p", "NoneType"]),
        ("varlen", {"dropout_p": "0"}, TypeError, ["dropout_p", "'0'"]),
        ("func", {"dropout_p": 1.0}, ValueError, ["dropout_p", "1.0"]),
        ("func", {"alibi_slopes": torch.zeros(3)}, ValueError, ["alibi_slopes", "(3,)"]),
        ("func", {"dropout_p": 0.1, "return_attn_probs": True}, ValueError, ["return_attn_probs", "S_dmask"]),
        ("kvpacked", {"kv": torch.zeros(2, 5, 3, 4, 8)}, ValueError, ["kv", "(2, 5, 3, 4, 8)"]),
        ("qkvpacked", {"qkv": X}, ValueError, ["qkv", "(2, 5, 4, 8)"]),
        ("varlen", {"q": X}, ValueError, ["q", "(total_q, nheads, headdim)"]),
        ("varlen", {"cu_seqlens_q": CU.long()}, TypeError, ["cu_seqlens_q", "int64"]),
        ("varlen", {"cu_seqlens_k": None}, TypeError, ["cu_seqlens_k", "None"]),
        ("varlen", {"block_table": I32}, ValueError, ["k", "(num_blocks, page_block_size, nheads_k, headdim)"]),
        (
            "varlen",
            {"k": X, "v": X, "block_table": torch.full((2, 1), 9, dtype=torch.int32)},
            ValueError,
            ["block_table", "between 0 and", "= 1", "9"],
        ),
        (
            "varlen",
            {"k": X[:, :2], "v": X[:, :2], "block_table": torch.zeros(2, 1, dtype=torch.int32)},
            ValueError,
            ["block_table", "3 keys"],
        ),
        ("cache", {"k": X}, ValueError, ["k and v"]),
        ("cache", {"k": X, "v": X}, ValueError, ["cache_seqlens", "capacity", "= 0", "got 2"]),
        ("cache", {"k": X, "v": X, "cache_seqlens": None}, ValueError, ["cache_seqlens", "k and v"]),
        ("cache", {"cache_seqlens": 2.0}, TypeError, ["cache_seqlens", "float"]),
        ("cache", {"cache_seqlens": I32.long()}, TypeError, ["cache_seqlens", "int64"]),
        ("cache", {"cache_seqlens": I32[:1]}, ValueError, ["cache_seqlens", "(1,)"]),
        ("cache", {"k_cache": X[:1], "v_cache": X[:1]}, ValueError, ["k_cache", "cache_batch_idx", "(1, 5, 4, 8)"]),
        ("cache", {"cache_batch_idx": I32 + 7}, ValueError, ["cache_batch_idx", "= 1", "got 7"]),
        (
            "cache",
            {"cache_batch_idx": I32, "block_table": torch.zeros(2, 1, dtype=torch.int32)},
            ValueError,
            ["cache_batch_idx", "block_table"],
        ),
        (
            "cache",
            {"k": X[:, :3], "v": X[:, :3], "cache_seqlens": I32 + 8, "block_table": torch.zeros(2, 2).int()},
            ValueError,
            ["cache_seqlens", "block_table", "= 7", "got 8"],
        ),
        ("cache", {"block_table": [[0, 1]]}, TypeError, ["block_table", "list"]),
        ("cache", {"block_table": I32}, ValueError, ["block_table", "(batch_size, max_num_blocks)", "(2,)"]),
        ("cache", {"block_table": I32[:1, None]}, ValueError, ["block_table", "= (2, 1)", "(1, 1)"]),
        ("cache", {"k": X.half(), "v": X, "cache_seqlens": 0}, TypeError, ["k has dtype", "float16"]),
        ("cache", {"k": X, "v": X.double(), "cache_seqlens": 0}, TypeError, ["v has dtype", "float64"]),
        ("cache", {"k": X.to("meta"), "v": X, "cache_seqlens": 0}, ValueError, ["k is on device meta"]),
        (
            "cache",
            {"k": X[:, :1], "v": X[:, :1], "cache_seqlens": 0, "rotary_cos": [0], "rotary_sin": torch.zeros(5, 4)},
            TypeError,
            ["rotary_cos", "list"],
        ),
        (
            "cache",
            {"k": X[:, :1], "v": X[:, :1], "cache_seqlens": 0, **dict.fromkeys(TABLES, torch.zeros(5, 5))},
            ValueError,
            ["rotary_cos has 5 columns", "headdim 8"],
        ),
        ("rotary", {"sin": torch.zeros(5, 3)}, ValueError, ["sin", "cos", "(5, 4)", "(5, 3)"]),
        ("rotary", {"cos": torch.zeros(5)}, ValueError, ["cos", "(seqlen_rotary, rotary_dim / 2)", "(5,)"]),
        ("cache", {"rotary_cos": torch.zeros(5, 4), "rotary_sin": torch.zeros(5, 4)}, ValueError, ["rotary_cos", "k"]),
        (
            "cache",
            {"k": X[:, :1], "v": X[:, :1], "rotary_cos": torch.zeros(2, 4), "rotary_sin": torch.zeros(2, 4)},
            ValueError,
            ["rotary_cos", "= 1", "got 2"],
        ),
        ("cache", {"q": X.clone().requires_grad_()}, ValueError, ["inference only", "requires grad"]),
        ("rotary", {"x": X[0]}, ValueError, ["x", "(5, 4, 8)"]),
        ("rotary", {"seqlen_offsets": 1}, ValueError, ["seqlen_offsets", "cos = 4", "got 5"]),
        ("rotary", {"seqlen_offsets": torch.zeros(3, dtype=torch.int64)}, ValueError, ["seqlen_offsets", "(3,)"]),
        ("unpad", {"attention_mask": torch.ones(2, 4)}, ValueError, ["attention_mask", "(2, 4)", "(2, 5)"]),
        ("pad", {"indices": torch.arange(4)}, ValueError, ["values", "4"]),
    ],
)
def test_bad_input(call: str, change: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    function, good = CALLS[call]
    function(**good)
    with pytest.raises(error) as caught:
        function(**{**good, **change})
    for word in words:
        assert word in str(caught.value)


def random_call(name: str) -> tuple[Any, dict[str, Any]]:
    """A good call, with other numbers than 0."""
    function, good = CALLS[name]
    fill = lambda x: torch.randn(x.shape) if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    return function, {name: fill(x) for name, x in good.items()}


@pytest.mark.parametrize(
    ("form", "plain"),
    [
        ({"window_size": torch.tensor([2, 1])}, {"window_size": (2, 1)}),
        ({"window_size": torch.tensor([-1, 0], dtype=torch.int32)}, {"window_size": (-1, 0)}),
        ({"window_size": torch.tensor([-1, -1])}, {}),
        ({"window_size": [torch.tensor(2), np.int64(1)]}, {"window_size": (2, 1)}),
        ({"window_size": np.array([2, 1])}, {"window_size": (2, 1)}),
        ({"causal": 1}, {"causal": True}),
        ({"causal": np.bool_(True)}, {"causal": True}),
        ({"causal": torch.tensor(False)}, {}),
        ({"softmax_scale": np.float32(0.25)}, {"softmax_scale": 0.25}),
        ({"softmax_scale": torch.tensor(0.25)}, {"softmax_scale": 0.25}),
        ({"softcap": np.float32(2.0)}, {"softcap": 2.0}),
        ({"softcap": torch.tensor([2.0])}, {"softcap": 2.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", ["func", "varlen", "cache"])
def test_numbers_of_other_types(call: str, form: dict[str, Any], plain: dict[str, Any]) -> None:
    """flash-attn hands them to C++, which converts; its own tests pass window_size as a tensor."""
    function, arguments = random_call(call)
    assert torch.equal(function(**arguments, **form), function(**arguments, **plain))


@pytest.mark.parametrize("call", ["func", "varlen"])
def test_dropout_of_other_types(call: str) -> None:
    function, arguments = random_call(call)
    outs = []
    for p in (0.25, np.float32(0.25), torch.tensor(0.25)):
        torch.manual_seed(3)
        outs.append(function(**arguments, dropout_p=p))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
