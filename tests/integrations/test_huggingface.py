"""fastattn as an attention implementation of Hugging Face Transformers: registration, calls, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils

import fastattn
from fastattn.integrations import huggingface
from fastattn.integrations.huggingface import attention as implementation
from fastattn.integrations.huggingface import attention_forward
from tests.integrations import huggingface_models as models
from tests.integrations.huggingface_models import BATCH, SEQLEN, VERSION, build, padding_mask, tokens

huggingface.register()

CACHE = "cache" if VERSION >= (5, 20) else "past_key_values"


def logits(name: str, implementation: str, inputs: dict[str, Any], **changes: Any) -> Tensor:
    with torch.no_grad():
        return build(name, implementation, **changes)(**inputs).logits


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- registration


def test_registered_in_both_interfaces() -> None:
    """A name that only the first knows loses its masks silently."""
    assert "fastattn" in transformers.AttentionInterface().valid_keys()
    assert "fastattn" in transformers.AttentionMaskInterface().valid_keys()
    assert "fastattn" in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    huggingface.register()
    model = build("Llama")
    model.set_attn_implementation("fastattn")
    assert model.config._attn_implementation == "fastattn"


def test_the_kernels_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy(monkeypatch, "attention")
    logits("Gemma 2", "fastattn", tokens("none"))
    assert [call["softcap"] for call in calls] == [2.0, 2.0]
    assert [call["window"] for call in calls] == [(3, None), None]
    assert all(call["causal"] and call["mask"] is None and call["kv_lengths"] is None for call in calls)
    assert [k.shape[1] for _, k, _ in (call["tensors"] for call in calls)] == [2, 2]  # heads are not repeated


def spy(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    function = getattr(fastattn, name)

    def record(*tensors: Any, **options: Any) -> Any:
        calls.append({**options, "tensors": tensors[:3]})
        return function(*tensors, **options)

    monkeypatch.setattr(implementation, name, record)
    return calls


@pytest.mark.parametrize("version", ["4.56.2", "4.48.0"])
def test_old_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    # The library replaces its own module when it loads a model.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ImportError, match=rf"needs transformers>=4.57, .* got transformers {version}"):
        huggingface.register()


def test_version_without_the_interfaces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare:
        __version__ = "5.99.0"
        AttentionInterface = transformers.AttentionInterface

    monkeypatch.setitem(sys.modules, "transformers", Bare)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=r"AttentionMaskInterface, got transformers 5\.99\.0"):
        huggingface.register()


def test_missing_transformers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"fastattn\.integrations\.huggingface needs transformers>=4\.57"):
        huggingface.register()


# --------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2", "Qwen 3"])  # gpt-oss gives its masks no position_ids
def test_packed_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As eager, as each sequence alone, and without a mask."""
    ids = tokens("none")["input_ids"]
    lengths = ([5, 8], [13], [1, 2, 10])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    calls = spy(monkeypatch, "attention_varlen")
    found = logits(name, "fastattn", inputs)
    assert len(calls) == 2
    assert all("mask" not in call for call in calls)
    assert_same(found, logits(name, "eager", inputs))
    for row, parts in enumerate(lengths):
        start = 0
        for n in parts:
            alone = logits(name, "fastattn", {"input_ids": ids[row : row + 1, start : start + n], "use_cache": False})
            assert_same(found[row, start : start + n], alone[0])
            start += n


def test_flash_attention_keywords_of_a_packed_batch() -> None:
    """The collators that pack pass them beside the position_ids; alone they would be ignored."""
    ids = tokens("none")["input_ids"][:1]
    bounds = torch.tensor([0, 5, 13], dtype=torch.int32)
    keywords = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 8, "max_length_k": 8}
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    assert_same(logits("Llama", "fastattn", inputs | keywords), logits("Llama", "eager", inputs))
    with pytest.raises(ValueError, match="its mask is not one of packed sequences"):
        logits("Llama", "fastattn", {"input_ids": ids, "use_cache": False, **keywords})


def test_packing_with_a_position_bias_is_spelled_out() -> None:
    """The bias counts from the start of the row."""
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    ids = (positions == 0).long().cumsum(1)
    function = masking_utils.and_masks(
        masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(ids)
    )
    queries = {"q_length": 5} if VERSION >= (5, 0) else {"cache_position": torch.arange(5)}
    mask = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["fastattn"](
        batch_size=1, kv_length=5, mask_function=function, **queries
    )
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64).unbind()
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    found, _ = attention_forward(nn.Module(), q, k, v, mask, position_bias=bias)
    expected, _ = models._exact(nn.Module(), q, k, v, mask.seen(), position_bias=bias)
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2"])
def test_pieces_through_a_cache(name: str, side: str, kind: str) -> None:
    """A prompt in pieces of 6, 4, 1, 1 and 1 tokens gives what it gives at once."""
    inputs = tokens(side)
    real = inputs["attention_mask"] == 1
    whole = logits(name, "eager", inputs)
    model = build(name, "fastattn")
    static = transformers.StaticCache(config=model.config, max_cache_len=20) if kind == "static" else None
    cache = transformers.DynamicCache(config=model.config) if static is None else static
    found, start = [], 0
    for n in (6, 4, 1, 1, 1):
        piece = {"input_ids": inputs["input_ids"][:, start : start + n], CACHE: cache, "use_cache": True}
        place = torch.arange(start, start + n)
        piece["position_ids"] = place.expand(BATCH, -1)
        piece["attention_mask"] = inputs["attention_mask"][:, : start + n]
        if CACHE == "past_key_values":
            piece["cache_position"] = place
        with torch.no_grad():
            found.append(model(**piece).logits)
        start += n
    assert_same(torch.cat(found, 1)[real], whole[real])


def test_unused_cache_is_never_read() -> None:
    """What lies in a static cache past the last query may be NaN."""
    call = {"batch_size": 1, "kv_length": 9, "mask_function": masking_utils.causal_mask_function}
    queries = {"q_length": 3, "q_offset": 2} if VERSION >= (5, 0) else {"cache_position": torch.tensor([2, 3, 4])}
    mask = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["fastattn"](**call, **queries)
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    k[:, :, 5:], v[:, :, 5:] = torch.nan, torch.nan
    out, _ = attention_forward(nn.Module(), q, k, v, mask)
    assert out.isfinite().all()


# ------------------------------------------------------------------------------------------------ masks of the user


def test_custom_float_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added to the scores: numbers count, the lowest one and -inf hide, and a row that sees nothing gives 0."""
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64).unbind()
    mask = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    mask[:, :, :, 3] = torch.finfo(torch.float64).min
    mask[:, :, :, 1] = -torch.inf
    mask[0, :, 2] = torch.finfo(torch.float64).min
    mask[1, :, 4] = -torch.inf
    mask.requires_grad_()
    calls = spy(monkeypatch, "attention")
    out, weights = attention_forward(nn.Module(), q, k, v, mask)
    assert weights is None
    assert torch.equal(calls[0]["mask"], mask > -1e300)
    scores = (q @ k.transpose(-2, -1) / 2 + mask).masked_fill(mask < -1e300, -torch.inf)
    expected = (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert (out[0, 2] == 0).all()
    assert (out[1, 4] == 0).all()
    (gradient,) = torch.autograd.grad(out.sum(), mask)
    assert gradient.isfinite().all()
    assert gradient[0, 0, 0, 0] != 0


def test_custom_masks_through_a_model() -> None:
    """A four-dimensional mask of floats, as eager takes it; the same as booleans, where True = attend."""
    ids = tokens("none")["input_ids"]
    seen = torch.rand(BATCH, 1, SEQLEN, SEQLEN, generator=torch.Generator().manual_seed(4)) < 0.6
    seen |= torch.eye(SEQLEN, dtype=torch.bool)
    floats = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    expected = logits("Llama", "eager", {"input_ids": ids, "attention_mask": floats})
    assert_same(logits("Llama", "fastattn", {"input_ids": ids, "attention_mask": floats}), expected)
    assert_same(logits("Llama", "fastattn", {"input_ids": ids, "attention_mask": seen}), expected)
    graded = floats + torch.randn(floats.shape, generator=torch.Generator().manual_seed(8))
    expected = logits("Llama", "eager", {"input_ids": ids, "attention_mask": graded})
    assert_same(logits("Llama", "fastattn", {"input_ids": ids, "attention_mask": graded}), expected)


def test_mask_functions_of_the_user() -> None:
    """Not of the library's making: spelled out, and right."""
    hidden = torch.zeros(BATCH, 5, 32)

    def prefix(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx < 2

    config = build("Llama", "fastattn").config
    common = {"config": config, "attention_mask": None, CACHE: None}
    if VERSION >= (5, 0):
        common["inputs_embeds"] = hidden
    else:
        common |= {"input_embeds": hidden, "cache_position": torch.arange(5)}
    mask = masking_utils.create_causal_mask(**common, or_mask_function=prefix)
    index = torch.arange(5)
    assert torch.equal(mask[0, 0] == 0, (index <= index[:, None]) | (index < 2))


def test_rows_of_padding_are_zero_and_never_nan() -> None:
    for name in ("Llama", "Mistral", "gpt-oss"):
        inputs = tokens("left")
        assert logits(name, "fastattn", inputs).isfinite().all()
        model = build(name, "fastattn")
        loss = model(**inputs).logits.square().mean()
        loss.backward()
        assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())
    inputs["attention_mask"][1] = 0  # a sequence of nothing but padding
    assert logits("Llama", "fastattn", inputs).isfinite().all()


# --------------------------------------------------------------------------------------------------------- options


def test_dropout_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy(monkeypatch, "attention")
    model, inputs = build("Llama", "fastattn", attention_dropout=0.4), tokens("right")
    torch.manual_seed(1)
    evaluated = model(**inputs).logits
    model.train()
    first, second = (_seeded(lambda: model(**inputs).logits) for _ in range(2))
    assert [call["dropout_p"] for call in calls] == [0.0] * 2 + [0.4] * 4
    assert torch.equal(first, second)
    assert not torch.allclose(first, evaluated, atol=1e-3)
    attention_forward(nn.Module().eval(), *torch.randn(3, 1, 2, 5, 4).unbind(), None, dropout=0.4, is_causal=False)
    assert calls[-1]["dropout_p"] == 0.0


def _seeded(function: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(2)
    return function()


def test_module_attribute_is_causal_counts_without_a_mask() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64).unbind()
    module = nn.Module()
    full, causal = (fastattn.attention(q, k, v, causal=causal).transpose(1, 2) for causal in (False, True))
    for attribute, argument, expected in (
        (False, None, full),
        (True, None, causal),
        (True, False, full),
        (False, True, causal),
    ):
        module.is_causal = attribute  # type: ignore[assignment]
        assert torch.equal(attention_forward(module, q, k, v, None, is_causal=argument)[0], expected)
    module.is_causal = True  # type: ignore[assignment]
    one = attention_forward(module, q[:, :, :1], k, v, None)[0]
    torch.testing.assert_close(one, full[:, :1])


def test_output_is_contiguous_and_heads_last() -> None:
    q, k, v = torch.randn(1, 6, 3, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 7)
    out, weights = attention_forward(nn.Module(), q, k, v, None, is_causal=False)
    assert out.shape == (1, 3, 6, 7)
    assert out.is_contiguous()
    assert weights is None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_gradient_checkpointing(name: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy(monkeypatch, "attention")
    gradients = []
    for checkpointing in (False, True):
        model, inputs = build(name, "fastattn").train(), models.inputs(name, "left")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs).loss.backward()
        gradients.append([x.grad for x in model.parameters()])
    assert len(calls) == 2 + 4
    assert all(call["mask"].shape[2] == 1 for call in calls)  # the plan survives
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("side", ["none", "left"])
def test_compiled(side: str) -> None:
    inputs = tokens(side)
    real = inputs["attention_mask"] == 1
    model = build("Mistral", "fastattn", num_hidden_layers=1)
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(**inputs, use_cache=False).logits
    torch._dynamo.reset()
    assert_same(found[real], logits("Mistral", "eager", inputs, num_hidden_layers=1)[real])


def test_compiled_decoding() -> None:
    """generate() compiles the steps with a static cache; here it is told to do so on a CPU."""
    compiling = transformers.generation.CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True
    options = {"do_sample": False, "max_new_tokens": 6, "cache_implementation": "static"}
    expected = build("Llama", num_hidden_layers=1).generate(**tokens("left"), **options)
    model = build("Llama", "fastattn", num_hidden_layers=1)
    found = model.generate(**tokens("left"), **options, compile_config=compiling)
    torch._dynamo.reset()
    assert torch.equal(found, expected)


# --------------------------------------------------------------------------------------------------------- refusals


def test_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="LlamaAttention passed indices: unknown to fastattn"):
        build("Llama", "fastattn")(**tokens("none"), indices=torch.zeros(1))
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    out, _ = attention_forward(nn.Module(), q, k, v, None, is_causal=False, head_mask=None, position_ids=torch.ones(1))
    assert out.shape == (1, 5, 2, 4)


def test_own_scaling_that_is_not_passed_is_refused() -> None:
    """GPT-2 of transformers 4 applies it in its eager attention alone."""
    inputs = tokens("none")
    if VERSION >= (5, 0):
        expected = logits("GPT-2", "eager", inputs, scale_attn_weights=False)
        assert_same(logits("GPT-2", "fastattn", inputs, scale_attn_weights=False), expected)
        return
    for change in ({"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}):
        with pytest.raises(ValueError, match=r"GPT2Attention has .* but passed no scaling"):
            logits("GPT-2", "fastattn", inputs, **change)


BAD_MASKS = {
    "two dimensions": (torch.ones(1, 5), ValueError, r"4 dimensions, got shape \(1, 5\)"),
    "whole numbers": (torch.ones(1, 1, 5, 5, dtype=torch.long), TypeError, "floating point .* got torch.int64"),
    "other length": (torch.ones(1, 1, 5, 6), ValueError, r"broadcastable to .* got shape \(1, 1, 5, 6\)"),
}


@pytest.mark.parametrize("bad", BAD_MASKS)
def test_bad_masks_are_refused(bad: str) -> None:
    mask, error, text = BAD_MASKS[bad]
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    with pytest.raises(error, match=text):
        attention_forward(nn.Module(), q, k, v, mask)


def test_a_mask_made_for_other_sizes_is_refused() -> None:
    call = {"batch_size": 1, "kv_length": 9, "mask_function": masking_utils.causal_mask_function}
    queries = {"q_length": 3} if VERSION >= (5, 0) else {"cache_position": torch.arange(3)}
    mask = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["fastattn"](**call, **queries)
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    with pytest.raises(ValueError, match=r"made for \(batch, seqlen_q, seqlen_k\) = \(1, 3, 9\), got query \(1, 2, 5"):
        attention_forward(nn.Module(), q, k, v, mask)


def test_calls_that_leave_the_mask_open_are_refused() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    module = nn.Module()
    with pytest.raises(ValueError, match=r"neither is_causal nor module\.is_causal"):
        attention_forward(module, q, k, v, None)
    with pytest.raises(ValueError, match="sliding_window=3 for 5 keys"):
        attention_forward(module, q, k, v, None, is_causal=True, sliding_window=3)
    with pytest.raises(ValueError, match="causal, for 2 queries and 5 keys"):
        attention_forward(module, q[:, :, :2], k, v, None, is_causal=True)
    assert attention_forward(module, q, k, v, None, is_causal=True, sliding_window=5)[0].isfinite().all()


def test_keys_of_another_sequence_need_no_mask() -> None:
    """Cross-attention that says nothing of causality sees everything, as in eager attention."""
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    other, Cross = nn.Module(), type("MllamaTextCrossAttention", (nn.Module,), {})
    found, _ = attention_forward(other, q[:, :, :3], k, v, None)
    assert_same(found, fastattn.attention(q[:, :, :3], k, v).transpose(1, 2))
    assert_same(attention_forward(Cross(), q, k, v, None)[0], fastattn.attention(q, k, v).transpose(1, 2))


def test_sinks_of_each_query() -> None:
    """Inkling2 computes them from the query, and names them `sinks`; also the gradients."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 4, 5, 8, dtype=torch.float64).unbind())
    sinks = torch.randn(2, 4, 5, 1, dtype=torch.float64, requires_grad=True)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()[None, None] & (torch.arange(5) != 0)  # the first sees nothing
    out, _ = attention_forward(nn.Module(), q, k, v, seen, sinks=sinks)
    scores = torch.cat([(q @ k.mT / 8**0.5).masked_fill(~seen, -torch.inf), sinks], -1)
    expected = (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2)
    weight = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    for found, exact in zip(*(torch.autograd.grad(x, (q, k, v, sinks), weight) for x in (out, expected)), strict=True):
        torch.testing.assert_close(found, exact)
    one = torch.randn(4, dtype=torch.float64)
    by_name, by_other_name = (attention_forward(nn.Module(), q, k, v, seen, **{n: one})[0] for n in ("sinks", "s_aux"))
    assert torch.equal(by_name, by_other_name)
    with pytest.raises(TypeError, match="Module passed both s_aux and sinks"):
        attention_forward(nn.Module(), q, k, v, seen, sinks=one, s_aux=one)


def test_padding_masks_of_the_tests_differ() -> None:
    """The sides that the models are tested with are what they are called."""
    left, right = padding_mask("left"), padding_mask("right")
    assert torch.equal(left, right.flip(1))
    assert not torch.equal(left, right)
    assert padding_mask("none").all()
