"""FlexAttention, flash-attn and xformers are called as documented, or say why not."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from benchmarks import rivals
from benchmarks.cases import Case
from benchmarks.data import make_data
from benchmarks.rivals import flex, gpu_package
from benchmarks.rivals.flash_attn import FlashAttn
from benchmarks.rivals.xformers import Xformers

from ..conftest import is_right_if_willing
from ..samples import CPU, FEATURES, name_of, tiny, unequal_lengths, verdict_on


# On the CPU FlexAttention has no backward and no float64.
@pytest.mark.parametrize("case", [c for c in FEATURES if not c.train and c.dtype != "float64"], ids=name_of)
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_flex_attention_is_told_every_feature(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    # Compiling takes seconds for each shape, and the masks and layouts made here are the same without.
    monkeypatch.setattr(flex, "_compiled_flex", lambda _: flex_attention)
    is_right_if_willing(flex.Flex(), case)


def fake_flash_attn(log: list[dict[str, Any]]) -> SimpleNamespace:
    """The documented signatures of flash-attn, computed by fastattn."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]) -> Tensor:
        log.append({"shape": q.shape, "causal": causal, "window_size": window_size})
        window = tuple(None if side < 0 else side for side in window_size)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return fastattn.attention(q, k, v, causal=causal, window=window).transpose(1, 2)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        causal: bool,
        window_size: tuple[int, int],
    ) -> Tensor:
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert max_seqlen_k == int(cu_seqlens_k.diff().max())
        log.append({"shape": q.shape, "causal": causal, "window_size": window_size})
        window = tuple(None if side < 0 else side for side in window_size)
        return fastattn.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, window=window)

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize(
    ("case", "shape", "window_size"),
    [
        (tiny(dtype="bfloat16"), (1, 24, 2, 16), (-1, -1)),
        (tiny(dtype="float16", causal=True, seqlen_k=40, mode="train"), (1, 24, 2, 16), (-1, 0)),
        (tiny(dtype="bfloat16", heads=4, heads_kv=2, window=(5, 2)), (1, 24, 4, 16), (5, 2)),
        (dataclasses.replace(unequal_lengths(causal=True), dtype="bfloat16"), (18, 2, 16), (-1, 0)),
    ],
)
def test_flash_attn_is_called_as_documented(
    case: Case, shape: tuple[int, ...], window_size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn(log))
    assert verdict_on(FlashAttn(), case).right
    assert log == [{"shape": torch.Size(shape), "causal": case.causal, "window_size": window_size}]


def fake_xformers() -> SimpleNamespace:
    """The documented signature of xformers.ops.memory_efficient_attention, computed by fastattn."""
    top_left, bottom_right = type("TopLeft", (), {}), type("BottomRight", (), {})

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, *, attn_bias: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if isinstance(attn_bias, Tensor):
            assert attn_bias.shape == (*q.shape[:3], k.shape[2])
            return fastattn.attention(q, k, v, bias=attn_bias).transpose(1, 2)
        alignment = "top-left" if isinstance(attn_bias, top_left) else "bottom-right"
        out = fastattn.attention(q, k, v, causal=attn_bias is not None, causal_alignment=alignment)
        return out.transpose(1, 2)

    masks = SimpleNamespace(LowerTriangularMask=top_left, LowerTriangularFromBottomRightMask=bottom_right)
    return SimpleNamespace(memory_efficient_attention=memory_efficient_attention, fmha=SimpleNamespace(attn_bias=masks))


@pytest.mark.parametrize(
    "case",
    [
        tiny(dtype="bfloat16", mode="train"),
        tiny(dtype="bfloat16", causal=True),
        tiny(dtype="float16", causal=True, seqlen_k=40),
        tiny(dtype="float16", causal=True, seqlen_k=40, causal_alignment="top-left"),
        tiny(dtype="bfloat16", mask="additive", batch=2),
    ],
    ids=name_of,
)
def test_xformers_is_called_as_documented(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = fake_xformers()
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    assert verdict_on(Xformers(), case).right


@pytest.mark.parametrize(
    ("rival", "case", "sentence"),
    [
        (FlashAttn(), tiny(mask="bool"), "no dense mask"),
        (FlashAttn(), tiny(head_dim=320), "head_dim <= 256"),
        (
            FlashAttn(),
            tiny(causal=True, seqlen_k=40, causal_alignment="top-left"),
            "bottom-right only",
        ),
        (Xformers(), tiny(heads=4, heads_kv=2), "no grouped heads"),
        (Xformers(), tiny(window=(3, 3)), "dense cases only"),
        (Xformers(), tiny(mask="additive", causal=True), "dense cases only"),
    ],
)
def test_gpu_packages_say_what_they_cannot_do(
    rival: rivals.Rival, case: Case, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(case, CPU)
    assert rival.why_not(case, data) is not None  # not installed, or no CUDA device
    monkeypatch.setattr(gpu_package, "why_unavailable", lambda *_: None)
    assert sentence in (rival.why_not(case, data) or "")
    assert rival.why_not(tiny(causal=True), data) is None


@pytest.mark.parametrize(
    ("package", "dtype", "sentence"),
    [
        ("no_such_package", "bfloat16", "no_such_package is not installed"),
        ("torch", "bfloat16", "torch runs on CUDA devices only"),
    ],
)
def test_gpu_packages_say_where_they_run(package: str, dtype: str, sentence: str) -> None:
    case = tiny(dtype=dtype)
    assert sentence in (gpu_package.why_unavailable(package, case, make_data(case, CPU)) or "")
