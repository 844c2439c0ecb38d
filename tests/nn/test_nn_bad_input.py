"""Every wrong argument gets a TypeError or ValueError that names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn.nn as fnn


def mha(*args: Any, **options: Any) -> fnn.MultiheadAttention:
    return fnn.MultiheadAttention(*(args or (8, 2)), **options)


def lm(**options: Any) -> fnn.TransformerLM:
    return fnn.TransformerLM(10, 8, 8, 2, 1, **options)


def transformer(**options: Any) -> fnn.Transformer:
    return fnn.Transformer(10, 8, 8, 2, 1, **options)


def ids(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def attend(module: fnn.MultiheadAttention | None = None, **call: Any) -> Any:
    """Self-attention of (seqlen 5, batch 3, 8)."""
    x = torch.randn(5, 3, 8)
    module = mha() if module is None else module
    return module(call.pop("query", x), call.pop("key", x), call.pop("value", x), **call)


def renamed(backend: str) -> fnn.MultiheadAttention:
    """A module whose backend was set after it was built."""
    module = mha()
    module.backend = backend
    return module


def cached(module: fnn.MultiheadAttention | None = None, **call: Any) -> Any:
    module = mha() if module is None else module
    cache = fnn.KVCache(3, 2, 9, 4)
    with torch.no_grad():
        return attend(module.eval(), kv_cache=cache, **{"need_weights": False, **call})


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(4, 8)])


def attend_nested(module: fnn.MultiheadAttention | None = None, **call: Any) -> Any:
    x = nested()
    module = mha(batch_first=True) if module is None else module
    call = {"need_weights": False, **call}
    return module(x, call.pop("key", x), call.pop("value", x), **call)


CASES: list[tuple[Any, type[Exception], str]] = [
    # building MultiheadAttention
    (lambda: mha(10, 4), ValueError, "embed_dim must be divisible by num_heads, got 10 and 4"),
    (lambda: mha(0, 1), ValueError, "embed_dim must be at least 1, got 0"),
    (lambda: mha(8, -2), ValueError, "num_heads must be at least 1, got -2"),
    (lambda: mha(8.0, 2), TypeError, "embed_dim must be an integer, got float"),
    (lambda: mha(8, True), TypeError, "num_heads must be an integer, got bool"),
    (lambda: mha(kdim=0), ValueError, "kdim must be at least 1"),
    (lambda: mha(dropout=1.1), ValueError, r"dropout must be in \[0, 1\], got 1.1"),
    (lambda: mha(dropout="a"), TypeError, "dropout must be a number, got str"),
    (
        lambda: mha(8, 4, num_kv_heads=3),
        ValueError,
        "num_heads must be divisible by num_kv_heads, got 4 and 3",
    ),
    (lambda: mha(num_kv_heads=0), ValueError, "num_kv_heads must be at least 1"),
    (lambda: mha(window=3), TypeError, r"window must be a pair \(left, right\) of integers or None, got 3"),
    (lambda: mha(window=(1, -1)), ValueError, "window's left and right must be at least 0, got -1"),
    (lambda: mha(window=(1.5, 0)), TypeError, "window's left and right must be an integer, got float"),
    (lambda: mha(softcap=0.0), ValueError, "softcap must be positive"),
    (lambda: mha(softcap="x"), TypeError, "softcap must be a number, got str"),
    (lambda: mha(scale=float("inf")), ValueError, "scale must be finite, got inf"),
    (lambda: mha(rotary=True), TypeError, "rotary must be a fastattn.nn.RotaryEmbedding, got bool"),
    (
        lambda: mha(rotary=fnn.RotaryEmbedding(6)),
        ValueError,
        "rotary must have dim = embed_dim // num_heads = 4, got 6",
    ),
    (lambda: mha(backend=3), TypeError, "backend must be a string or None, got int"),
    (lambda: mha(backend="abacus"), ValueError, "backend must be .*'torch'.*'reference'.* got 'abacus'"),
    (lambda: attend(renamed("abacus")), ValueError, "backend must be .* got 'abacus'"),
    (lambda: attend(renamed("abacus"), need_weights=False), ValueError, "backend must be .* got 'abacus'"),
    (lambda: mha(backend="torch", sinks=True), ValueError, "has neither softcap nor sinks, got sinks"),
    (lambda: mha(backend="torch", softcap=2.0), ValueError, "has neither softcap nor sinks, got softcap"),
    # calling it
    (lambda: attend(query=[1.0]), TypeError, "query must be a torch.Tensor, got list"),
    (lambda: attend(key=None), TypeError, "key must be a torch.Tensor, got NoneType"),
    (
        lambda: attend(query=torch.randn(8)),
        ValueError,
        r"query must have shape \(seqlen, batch, 8\), got \(8,\)",
    ),
    (lambda: attend(query=torch.randn(5, 3, 7)), ValueError, r"query must have shape .* got \(5, 3, 7\)"),
    (
        lambda: attend(key=torch.randn(5, 8)),
        ValueError,
        r"key must have shape \(seqlen, batch, 8\), got \(5, 8\)",
    ),
    (
        lambda: attend(query=torch.randn(5, 7)),
        ValueError,
        r"query must have shape \(seqlen, 8\), got \(5, 7\)",
    ),
    (
        lambda: attend(value=torch.randn(4, 3, 8)),
        ValueError,
        "key and value must have the same batch and seqlen",
    ),
    (lambda: attend(query=torch.randn(5, 2, 8)), ValueError, "query and key must have the same batch"),
    (
        lambda: attend(key_padding_mask=torch.zeros(5, 3, dtype=torch.bool)),
        ValueError,
        r"key_padding_mask must have shape \(3, 5\), got \(5, 3\)",
    ),
    (
        lambda: attend(attn_mask=torch.zeros(3, 5, 5)),
        ValueError,
        r"attn_mask must have shape \(5, 5\) or \(6, 5, 5\), got \(3, 5, 5\)",
    ),
    (
        lambda: attend(attn_mask=torch.zeros(5, 5).int()),
        TypeError,
        "attn_mask must have dtype torch.bool .* got torch.int32",
    ),
    (lambda: attend(key_padding_mask=ids(3, 5)), TypeError, "key_padding_mask must have dtype torch.bool"),
    (lambda: attend(attn_mask=[[0.0]]), TypeError, "attn_mask must be a torch.Tensor, got list"),
    (lambda: attend(positions=torch.arange(5)), ValueError, "positions need a module with rotary"),
    (
        lambda: attend(mha(rotary=fnn.RotaryEmbedding(4)), positions=torch.arange(5), query=torch.randn(4, 3, 8)),
        ValueError,
        "positions are for self-attention",
    ),
    (
        lambda: attend(mha(rotary=fnn.RotaryEmbedding(4)), positions=torch.arange(4)),
        ValueError,
        "positions must have shape",
    ),
    # with a cache
    (lambda: cached(need_weights=True), ValueError, "kv_cache needs need_weights=False"),
    (lambda: cached(mha(add_zero_attn=True)), ValueError, "kv_cache needs a module without add_bias_kv"),
    (lambda: cached(mha(backend="torch")), ValueError, "kv_cache needs a backend of fastattn"),
    (
        lambda: cached(mha(rotary=fnn.RotaryEmbedding(4)), positions=torch.arange(5)),
        ValueError,
        "kv_cache needs positions=None",
    ),
    (lambda: cached(key=None), ValueError, "key and value go together, got one of them as None"),
    (lambda: attend(kv_cache={}), TypeError, "kv_cache must be a fastattn.nn.KVCache, got dict"),
    (
        lambda: attend(mha(dropout=0.1), kv_cache=fnn.KVCache(3, 2, 9, 4), need_weights=False),
        ValueError,
        "kv_cache needs evaluation mode, or dropout=0",
    ),
    (
        lambda: cached(key_padding_mask=torch.zeros(3, 5)),
        ValueError,
        r"key_padding_mask must have shape \(3, 9\)",
    ),
    # nested tensors
    (
        lambda: attend_nested(need_weights=True),
        ValueError,
        "need_weights must be None or False with NestedTensor",
    ),
    (
        lambda: attend_nested(attn_mask=torch.zeros(4, 4)),
        ValueError,
        "attn_mask must be None or False with NestedTensor inputs, got a Tensor",
    ),
    (lambda: attend_nested(mha()), ValueError, "NestedTensor inputs need batch_first=True"),
    (
        lambda: attend_nested(key=torch.randn(2, 4, 8)),
        TypeError,
        "key must be a NestedTensor as query is one",
    ),
    (lambda: attend_nested(key=None), TypeError, "key must be a NestedTensor as query is one, got NoneType"),
    (lambda: attend(key=nested()), TypeError, "key is a NestedTensor, but query is dense"),
    (
        lambda: attend_nested(value=torch.nested.nested_tensor([torch.randn(4, 8), torch.randn(2, 8)])),
        ValueError,
        "value must hold sequences of the same lengths as key",
    ),
    # position encodings
    (lambda: fnn.RotaryEmbedding(7), ValueError, "rotary_dim must be even and at most dim = 7, got 7"),
    (
        lambda: fnn.RotaryEmbedding(8, rotary_dim=10),
        ValueError,
        "rotary_dim must be even and at most dim = 8, got 10",
    ),
    (lambda: fnn.RotaryEmbedding(8, base=1.0), ValueError, "base must be greater than 1, got 1.0"),
    (lambda: fnn.RotaryEmbedding(8, base="x"), TypeError, "base must be a number, got str"),
    (
        lambda: fnn.RotaryEmbedding(8)(torch.randn(1, 1, 3, 6)),
        ValueError,
        r"x must have shape \(batch, heads, seqlen, 8\)",
    ),
    (
        lambda: fnn.RotaryEmbedding(8)(torch.randn(1, 1, 3, 8), torch.ones(3)),
        TypeError,
        "positions must have dtype torch.int32 or torch.int64",
    ),
    (
        lambda: fnn.RotaryEmbedding(8)(torch.randn(1, 1, 3, 8), torch.arange(4)),
        ValueError,
        "positions must have shape",
    ),
    (lambda: fnn.RotaryEmbedding(8).tables(-1), ValueError, "length must be at least 0, got -1"),
    (lambda: fnn.SinusoidalPositionalEncoding(0), ValueError, "dim must be at least 1"),
    (
        lambda: fnn.SinusoidalPositionalEncoding(4)(torch.randn(2, 3, 5)),
        ValueError,
        r"x must have shape \(batch, seqlen, 4\), got \(2, 3, 5\)",
    ),
    (lambda: fnn.LearnedPositionalEncoding(0, 4), ValueError, "max_length must be at least 1"),
    (
        lambda: fnn.LearnedPositionalEncoding(2, 4)(torch.randn(1, 3, 4)),
        ValueError,
        "x must have at most max_length = 2 positions, got 3",
    ),
    (
        lambda: fnn.LearnedPositionalEncoding(2, 4)(torch.randn(1, 3, 4), torch.tensor([0, 1, 2])),
        ValueError,
        "positions must be from 0 to max_length - 1 = 1, got 2",
    ),
    (
        lambda: fnn.LearnedPositionalEncoding(2, 4)(torch.randn(1, 1, 4), torch.tensor([-1])),
        ValueError,
        "positions must be from 0 to max_length - 1 = 1, got -1",
    ),
    (
        lambda: fnn.LearnedPositionalEncoding(2, 4)(torch.randn(1, 1, 4), torch.tensor([0.0])),
        TypeError,
        "positions must have dtype",
    ),
    (
        lambda: fnn.SinusoidalPositionalEncoding(4)(torch.randn(2, 3, 4), ids(3, 3)),
        ValueError,
        r"positions must have shape \(seqlen,\) = \(3,\) or \(batch, seqlen\) = \(2, 3\), got \(3, 3\)",
    ),
    (lambda: fnn.alibi_slopes(0), ValueError, "num_heads must be at least 1, got 0"),
    (lambda: fnn.alibi_slopes(2.0), TypeError, "num_heads must be an integer, got float"),
    # models
    (lambda: fnn.TransformerLM(0, 8, 8, 2, 1), ValueError, "vocab_size must be at least 1"),
    (lambda: fnn.TransformerLM(10, 8, 8, 3, 1), ValueError, "embedding_dim must be divisible by num_heads"),
    (lambda: fnn.Transformer(10, 8, 8, 2, -1), ValueError, "num_layers must be at least 1, got -1"),
    (lambda: lm(dropout=-0.1), ValueError, r"dropout must be in \[0, 1\], got -0.1"),
    (lambda: lm(max_length=0), ValueError, "max_length must be at least 1"),
    (lambda: lm(positional="none"), ValueError, r"positional must be one of \('learned', .* got 'none'"),
    (
        lambda: fnn.TransformerLM(10, 6, 8, 2, 1, positional="rotary"),
        ValueError,
        'embedding_dim // num_heads must be even with positional="rotary", got 6 // 2',
    ),
    (
        lambda: transformer(start_token_id=10),
        ValueError,
        "start_token_id must be less than vocab_size = 10, got 10",
    ),
    (lambda: transformer(memory_dim=0), ValueError, "memory_dim must be at least 1"),
    (lambda: lm()([[1]]), TypeError, "input_ids must be a torch.Tensor of token ids, got list"),
    (
        lambda: lm()(ids(1, 3).float()),
        TypeError,
        "input_ids must have dtype torch.int64 or torch.int32, got torch.float32",
    ),
    (lambda: lm()(ids(3)), ValueError, r"input_ids must have shape \(batch, seqlen\), got \(3,\)"),
    (lambda: lm()(ids(1, 3) + 10), ValueError, "input_ids must hold token ids from 0 to 9, got 10"),
    (lambda: lm()(ids(1, 3) - 1), ValueError, "input_ids must hold token ids from 0 to 9, got -1"),
    (
        lambda: lm()(ids(2, 3), ids(2, 4)),
        ValueError,
        r"attention_mask must have shape \(batch, seqlen\) = \(2, 3\), got \(2, 4\)",
    ),
    (
        lambda: lm()(ids(2, 3), torch.ones(2, 3)),
        TypeError,
        "attention_mask must have dtype torch.bool or an integer one",
    ),
    (lambda: lm()(ids(2, 3), [1]), TypeError, "attention_mask must be a torch.Tensor, got list"),
    (
        lambda: lm(positional="learned", max_length=2)(ids(1, 3)),
        ValueError,
        "input_ids must have at most max_length = 2 tokens per row, got 3",
    ),
    (lambda: transformer()(None), ValueError, "decoder_input_ids must be given when input_ids is None"),
    (
        lambda: transformer()(None, decoder_input_ids=ids(1, 2)),
        ValueError,
        "input_ids must be given when memory is None",
    ),
    (lambda: transformer()(ids(1, 2), memory_mask=ids(1, 2)), ValueError, "memory_mask needs memory"),
    (
        lambda: transformer()(ids(2, 3), decoder_input_ids=ids(1, 3)),
        ValueError,
        r"decoder_input_ids must have batch 2, got shape \(1, 3\)",
    ),
    (
        lambda: transformer()(ids(1, 3), decoder_input_ids=ids(1, 3) + 99),
        ValueError,
        "decoder_input_ids must hold token ids",
    ),
    (
        lambda: transformer()(ids(2, 3), decoder_input_ids=ids(2, 4), decoder_attention_mask=ids(2, 3)),
        ValueError,
        r"decoder_attention_mask must have shape \(batch, seqlen\) = \(2, 4\)",
    ),
    (
        lambda: transformer()(ids(1, 2), memory=ids(1, 2, 8)),
        TypeError,
        "memory must have a floating point dtype",
    ),
    (lambda: transformer()(ids(1, 2), memory=[1.0]), TypeError, "memory must be a torch.Tensor, got list"),
    (
        lambda: transformer(memory_dim=5)(ids(1, 2), memory=torch.randn(1, 2, 8)),
        ValueError,
        r"memory must have shape \(batch, memory_seqlen, memory_dim = 5\), got \(1, 2, 8\)",
    ),
    (
        lambda: transformer()(ids(1, 2), memory=torch.randn(1, 2, 8), memory_mask=ids(1, 3)),
        ValueError,
        r"memory_mask must have shape \(batch, seqlen\) = \(1, 2\)",
    ),
    # generation
    (
        lambda: lm().generate(ids(2, 0), 3),
        ValueError,
        r"input_ids must have at least one row and one token, got shape \(2, 0\)",
    ),
    (lambda: lm().generate(ids(0, 2), 3), ValueError, "input_ids must have at least one row"),
    (lambda: lm().generate(ids(1, 2), -1), ValueError, "max_new_tokens must be at least 0, got -1"),
    (lambda: lm().generate(ids(1, 2), 2.0), TypeError, "max_new_tokens must be an integer, got float"),
    (
        lambda: lm().generate(ids(2, 3), 2, attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]])),
        ValueError,
        "attention_mask must mark at least one real token per row, got none in row 1",
    ),
    (
        lambda: lm().generate(ids(1, 2), 2, do_sample=True, top_p=0),
        ValueError,
        r"top_p must be in \(0, 1\], got 0",
    ),
    (lambda: lm().generate(ids(1, 2), 2, top_k=3), ValueError, "need do_sample=True"),
    (lambda: lm().generate(ids(1, 2), 2, page_size=0), ValueError, "page_size must be at least 1"),
    (
        lambda: lm().generate(ids(1, 2), 2, eos_token_id=10),
        ValueError,
        "eos_token_id must be less than vocab_size = 10",
    ),
    (lambda: lm().generate(ids(1, 2), 2, eos_token_id=-1), ValueError, "eos_token_id must be at least 0, got -1"),
    (lambda: transformer().generate(ids(1, 2), 2, eos_token_id=1.0), TypeError, "eos_token_id must be an integer"),
    (
        lambda: transformer().generate(ids(1, 0), 2),
        ValueError,
        "input_ids must have at least one row and one token",
    ),
    (lambda: transformer().generate(None, 2), ValueError, "input_ids must be given when memory is None"),
    (
        lambda: transformer().generate(None, 2, memory=torch.randn(1, 0, 8)),
        ValueError,
        "memory must have at least one row and one token",
    ),
    (
        lambda: transformer(max_length=4).generate(ids(1, 2), 5),
        ValueError,
        "the generated sequence must have at most max_length = 4",
    ),
    (
        lambda: transformer(backend="torch").generate(ids(1, 2), 2),
        ValueError,
        'use_cache must be False for a model with backend="torch"',
    ),
]


SAME = r"but the weights have torch\.{}: they must be the same"
CASES += [
    (
        lambda: attend(query=torch.randn(5, 3, 8, dtype=torch.float64)),
        TypeError,
        r"query has dtype torch\.float64, " + SAME.format("float32"),
    ),
    (
        lambda: attend(mha().bfloat16(), query=torch.randn(5, 3, 8)),
        TypeError,
        r"query has dtype torch\.float32, " + SAME.format("bfloat16"),
    ),
    (
        lambda: attend(mha(kdim=8, vdim=8, bias=False), key=torch.ones(5, 3, 8, dtype=torch.int64)),
        TypeError,
        r"key has dtype torch\.int64, " + SAME.format("float32"),
    ),
    (
        lambda: attend(mha(8, 2, vdim=4), value=torch.ones(5, 3, 4).half()),
        TypeError,
        r"value has dtype torch\.float16, " + SAME.format("float32"),
    ),
    (
        lambda: transformer(memory_dim=5)(ids(1, 2), memory=torch.randn(1, 2, 5).double()),
        TypeError,
        r"memory has dtype torch\.float64, " + SAME.format("float32"),
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[message for _, _, message in CASES])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_autocast_casts_all_but_float64() -> None:
    half, double = torch.randn(5, 3, 8).half(), torch.randn(5, 3, 8).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(query=half, key=half, value=half)[0].dtype == torch.bfloat16
        assert attend(query=half)[0].dtype == torch.bfloat16
        with pytest.raises(
            TypeError, match=r"query has dtype torch\.float64, .* other than float64 under torch.autocast"
        ):
            attend(query=double)
