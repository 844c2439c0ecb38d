"""Bad input: each a TypeError or ValueError that names the argument, what came and what was expected.

And nothing happens before it: caches keep their bits, whatever was wrong with the call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import Rotary

Z = torch.zeros


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Bad:
    """A good call with some arguments replaced, and what the message must say."""

    name: str
    change: dict[str, Any]
    error: type[Exception]
    words: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self.name

    def check(self, function: Any, good: dict[str, Any]) -> None:
        arguments = {**good, **self.change}
        positional = [arguments.pop(name) for name in list(good) if name in POSITIONAL]
        with pytest.raises(self.error) as caught:
            function(*positional, **arguments)
        assert type(caught.value) is self.error
        for word in self.words:
            assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


POSITIONAL = ("q", "k", "v", "k_cache", "v_cache", "cu_seqlens_q", "cu_seqlens_k")

# Wrong whatever the function. q is (.., 4 heads, 5, 8), k and v have 2 heads; batch is 2.
OPTIONS = (
    Bad("softcap 0", {"softcap": 0.0}, ValueError, ["softcap", "positive", "got 0.0"]),
    Bad("softcap negative", {"softcap": -1.0}, ValueError, ["softcap", "positive", "got -1.0"]),
    Bad("softcap inf", {"softcap": torch.inf}, ValueError, ["softcap", "finite", "got inf"]),
    Bad("softcap NaN", {"softcap": torch.nan}, ValueError, ["softcap", "finite", "got nan"]),
    Bad("softcap text", {"softcap": "1"}, TypeError, ["softcap", "number", "str '1'"]),
    Bad("softcap bool", {"softcap": True}, TypeError, ["softcap", "number", "bool True"]),
    Bad("softcap tensor", {"softcap": torch.tensor(1.0)}, TypeError, ["softcap", "number", "Tensor"]),
    Bad("scale NaN", {"scale": torch.nan}, ValueError, ["scale", "finite", "got nan"]),
    Bad("scale inf", {"scale": -torch.inf}, ValueError, ["scale", "finite", "got -inf"]),
    Bad("scale tensor", {"scale": torch.tensor(1.0)}, TypeError, ["scale", "number", "Tensor"]),
    Bad("scale list", {"scale": [1.0]}, TypeError, ["scale", "number", "list [1.0]"]),
    Bad("scale bool", {"scale": True}, TypeError, ["scale", "number", "bool True"]),
    Bad("scale complex", {"scale": 1j}, TypeError, ["scale", "number", "complex"]),
    Bad("window negative", {"window": (-1, 0)}, ValueError, ["window", ">= 0", "window_left = -1"]),
    Bad("window negative right", {"window": (None, -2)}, ValueError, ["window", ">= 0", "window_right = -2"]),
    Bad("window one number", {"window": 3}, TypeError, ["window", "pair (left, right)", "got 3"]),
    Bad("window of three", {"window": (1, 2, 3)}, TypeError, ["window", "pair (left, right)", "(1, 2, 3)"]),
    Bad("window of floats", {"window": (1.0, 0)}, TypeError, ["window", "integers or None", "float 1.0"]),
    Bad("window of bools", {"window": (True, 0)}, TypeError, ["window", "integers or None", "bool True"]),
    Bad("window of texts", {"window": (0, "a")}, TypeError, ["window", "integers or None", "str 'a'"]),
    Bad("window of lists", {"window": ([1], 0)}, TypeError, ["window", "integers or None", "list [1]"]),
    Bad("window of tensors", {"window": (torch.tensor(1), 0)}, TypeError, ["window", "integers", "Tensor"]),
    Bad("window text", {"window": "12"}, TypeError, ["window", "pair (left, right)", "'12'"]),
    Bad("causal text", {"causal": "yes"}, TypeError, ["causal", "bool", "str 'yes'"]),
    Bad("causal None", {"causal": None}, TypeError, ["causal", "bool", "None"]),
    Bad("causal number", {"causal": 1}, TypeError, ["causal", "bool", "int 1"]),
    Bad("causal mask", {"causal": Z(5, 7).bool()}, TypeError, ["causal", "bool", "Tensor"]),
    Bad("alignment", {"causal_alignment": "upper-left"}, ValueError, ["causal_alignment", "top-left", "'upper-left'"]),
    Bad("alignment None", {"causal_alignment": None}, TypeError, ["causal_alignment", "top-left", "None"]),
    Bad("alignment list", {"causal_alignment": ["top-left"]}, TypeError, ["causal_alignment", "['top-left']"]),
    Bad("mask float", {"mask": Z(5, 7)}, TypeError, ["mask", "torch.bool", "torch.float32", "bias"]),
    Bad("mask int", {"mask": Z(5, 7).int()}, TypeError, ["mask", "torch.bool", "torch.int32"]),
    Bad("mask list", {"mask": [[True]]}, TypeError, ["mask", "torch.Tensor", "list"]),
    Bad("mask sparse", {"mask": Z(5, 7).bool().to_sparse()}, TypeError, ["mask", "dense", "sparse_coo"]),
    Bad("mask heads", {"mask": Z(3, 1, 1).bool()}, ValueError, ["mask", "broadcastable", "(3, 1, 1)"]),
    Bad("mask batch", {"mask": Z(3, 1, 1, 1).bool()}, ValueError, ["mask", "broadcastable", "(3, 1, 1, 1)"]),
    Bad("mask 5-D", {"mask": Z(1, 1, 1, 1, 1).bool()}, ValueError, ["mask", "broadcastable", "(1, 1, 1, 1, 1)"]),
    Bad("bias int", {"bias": Z(5, 7).long()}, TypeError, ["bias", "floating", "torch.int64"]),
    Bad("bias bool", {"bias": Z(5, 7).bool()}, TypeError, ["bias", "floating", "torch.bool"]),
    Bad("bias complex", {"bias": Z(5, 7).cfloat()}, TypeError, ["bias", "floating", "complex64"]),
    Bad("bias number", {"bias": 0.5}, TypeError, ["bias", "torch.Tensor", "float"]),
    Bad("bias heads", {"bias": Z(3, 1, 1)}, ValueError, ["bias", "broadcastable", "(3, 1, 1)"]),
    Bad("bias of no size", {"bias": Z(0, 1, 1)}, ValueError, ["bias", "broadcastable", "(0, 1, 1)"]),
    Bad("alibi heads", {"alibi_slopes": Z(3)}, ValueError, ["alibi_slopes", "(4,)", "(2, 4)", "got (3,)"]),
    Bad("alibi rank", {"alibi_slopes": Z(2, 4, 1)}, ValueError, ["alibi_slopes", "(4,)", "got (2, 4, 1)"]),
    Bad("alibi batch", {"alibi_slopes": Z(1, 4)}, ValueError, ["alibi_slopes", "(2, 4)", "got (1, 4)"]),
    Bad("alibi int", {"alibi_slopes": Z(4).int()}, TypeError, ["alibi_slopes", "floating", "torch.int32"]),
    Bad("alibi list", {"alibi_slopes": [0.5] * 4}, TypeError, ["alibi_slopes", "torch.Tensor", "list"]),
    Bad("sinks heads", {"sinks": Z(2)}, ValueError, ["sinks", "(heads_q,) = (4,)", "got (2,)"]),
    Bad("sinks rank", {"sinks": Z(4, 1)}, ValueError, ["sinks", "(4,)", "got (4, 1)"]),
    Bad("sinks int", {"sinks": Z(4).long()}, TypeError, ["sinks", "floating", "torch.int64"]),
    Bad("sinks device", {"sinks": Z(4, device="meta")}, ValueError, ["sinks", "meta", "cpu"]),
    Bad("bias device", {"bias": Z(5, 7, device="meta")}, ValueError, ["bias", "meta", "cpu"]),
    Bad("backend unknown", {"backend": "nonsense"}, ValueError, ["backend", "reference", "'nonsense'"]),
    Bad("backend number", {"backend": 3}, TypeError, ["backend", "string", "int 3"]),
    Bad("backend list", {"backend": ["reference"]}, TypeError, ["backend", "string", "list"]),
)

# Wrong for attention and attention_varlen, which have dropout and kv_lengths.
TRAINING_OPTIONS = (
    Bad("dropout 1", {"dropout_p": 1.0}, ValueError, ["dropout_p", "[0, 1)", "got 1.0"]),
    Bad("dropout negative", {"dropout_p": -0.1}, ValueError, ["dropout_p", "[0, 1)", "got -0.1"]),
    Bad("dropout 2", {"dropout_p": 2}, ValueError, ["dropout_p", "[0, 1)", "got 2"]),
    Bad("dropout NaN", {"dropout_p": torch.nan}, ValueError, ["dropout_p", "finite", "got nan"]),
    Bad("dropout None", {"dropout_p": None}, TypeError, ["dropout_p", "number", "None"]),
    Bad("dropout text", {"dropout_p": "a"}, TypeError, ["dropout_p", "number", "'a'"]),
    Bad("seed negative", {"dropout_p": 0.1, "seed": -1}, ValueError, ["seed", "[0, 2**63)", "got -1"]),
    Bad("seed too large", {"dropout_p": 0.1, "seed": 2**63}, ValueError, ["seed", "[0, 2**63)", str(2**63)]),
    Bad("seed float", {"dropout_p": 0.1, "seed": 1.0}, TypeError, ["seed", "int", "float 1.0"]),
    Bad("seed bool", {"dropout_p": 0.1, "seed": True}, TypeError, ["seed", "int", "bool True"]),
    Bad("seed int32", {"dropout_p": 0.1, "seed": Z((), dtype=torch.int32)}, TypeError, ["seed", "int64", "int32"]),
    Bad("seed of one", {"dropout_p": 0.1, "seed": Z(1).long()}, ValueError, ["seed", "single number", "(1,)"]),
    Bad("seed without dropout", {"seed": -1}, ValueError, ["seed", "[0, 2**63)", "got -1"]),
    Bad("lengths int64", {"kv_lengths": Z(2).long()}, TypeError, ["kv_lengths", "torch.int32", "torch.int64"]),
    Bad("lengths float", {"kv_lengths": Z(2)}, TypeError, ["kv_lengths", "torch.int32", "torch.float32"]),
    Bad("lengths list", {"kv_lengths": [1, 2]}, TypeError, ["kv_lengths", "torch.Tensor", "list"]),
    Bad("lengths batch", {"kv_lengths": int32(1, 2, 3)}, ValueError, ["kv_lengths", "(batch,) = (2,)", "got (3,)"]),
    Bad("lengths rank", {"kv_lengths": int32(1, 2)[None]}, ValueError, ["kv_lengths", "(2,)", "got (1, 2)"]),
    Bad("offset int64", {"q_offset": Z(2).long()}, TypeError, ["q_offset", "torch.int32", "torch.int64"]),
    Bad("offset bool", {"q_offset": True}, TypeError, ["q_offset", "an int or an int32 tensor", "bool True"]),
    Bad("offset float", {"q_offset": 1.0}, TypeError, ["q_offset", "an int or an int32 tensor", "float 1.0"]),
    Bad("offset list", {"q_offset": [1, 2]}, TypeError, ["q_offset", "an int or an int32 tensor", "list"]),
    Bad("offset huge", {"q_offset": 2**28 + 1}, ValueError, ["q_offset", "-2**28 and 2**28", "got 268435457"]),
    Bad("offset batch", {"q_offset": int32(1, 2, 3)}, ValueError, ["q_offset", "(batch,) = (2,)", "got (3,)"]),
    Bad("offset rank", {"q_offset": torch.tensor(1, dtype=torch.int32)}, ValueError, ["q_offset", "(2,)", "got ()"]),
    Bad("offset past", {"q_offset": int32(0, -(2**28) - 1)}, ValueError, ["q_offset[1] = -268435457", "-2**28"]),
    Bad(
        "lengths negative", {"kv_lengths": int32(1, -1)}, ValueError, ["kv_lengths", "between 0", "kv_lengths[1] = -1"]
    ),
)

DENSE: dict[str, Any] = {"q": Z(2, 4, 5, 8), "k": Z(2, 2, 7, 8), "v": Z(2, 2, 7, 6)}
DENSE_BAD = (
    *OPTIONS,
    *TRAINING_OPTIONS,
    Bad("q None", {"q": None}, TypeError, ["q ", "torch.Tensor", "NoneType"]),
    Bad("k list", {"k": [1.0]}, TypeError, ["k ", "torch.Tensor", "list"]),
    Bad("v array", {"v": Z(2, 2, 7, 6).numpy()}, TypeError, ["v ", "torch.Tensor", "ndarray"]),
    Bad("q sparse", {"q": Z(2, 4, 5, 8).to_sparse()}, TypeError, ["q ", "dense", "sparse_coo"]),
    Bad("q rank 3", {"q": Z(4, 5, 8)}, ValueError, ["q ", "(batch, heads_q, seqlen_q, head_dim)", "(4, 5, 8)"]),
    Bad("q rank 5", {"q": Z(1, 2, 4, 5, 8)}, ValueError, ["q ", "4 dimensions", "(1, 2, 4, 5, 8)"]),
    Bad("k rank", {"k": Z(2, 7, 8)}, ValueError, ["k ", "(batch, heads_kv, seqlen_k, head_dim)", "(2, 7, 8)"]),
    Bad("v rank", {"v": Z(2, 7, 6)}, ValueError, ["v ", "(batch, heads_kv, seqlen_k, head_dim_v)", "(2, 7, 6)"]),
    Bad("batch of k", {"k": Z(3, 2, 7, 8)}, ValueError, ["k ", "(2, 2, 7, 8)", "(3, 2, 7, 8)"]),
    Bad("batch of v", {"v": Z(3, 2, 7, 6)}, ValueError, ["v ", "(2, 2, 7)", "(3, 2, 7)"]),
    Bad("heads of v", {"v": Z(2, 4, 7, 6)}, ValueError, ["v ", "(2, 2, 7)", "(2, 4, 7)"]),
    Bad("seqlen of v", {"v": Z(2, 2, 6, 6)}, ValueError, ["v ", "(2, 2, 7)", "(2, 2, 6)"]),
    Bad("head_dim", {"k": Z(2, 2, 7, 4)}, ValueError, ["k ", "(2, 2, 7, 8)", "(2, 2, 7, 4)"]),
    Bad("heads", {"q": Z(2, 3, 5, 8)}, ValueError, ["heads of q", "multiple", "3 and 2"]),
    Bad("fewer heads in q", {"q": Z(2, 1, 5, 8)}, ValueError, ["heads of q", "multiple", "1 and 2"]),
    Bad("no kv heads", {"k": Z(2, 0, 7, 8), "v": Z(2, 0, 7, 6)}, ValueError, ["heads of q", "multiple", "4 and 0"]),
    Bad("dtype of q", {"q": Z(2, 4, 5, 8).int()}, TypeError, ["q ", "float32", "torch.int32"]),
    Bad("complex", {n: x.cfloat() for n, x in DENSE.items()}, TypeError, ["q ", "float32", "torch.complex64"]),
    Bad("all bool", {n: x.bool() for n, x in DENSE.items()}, TypeError, ["q ", "float32", "torch.bool"]),
    Bad("float8", {n: x.to(torch.float8_e4m3fn) for n, x in DENSE.items()}, TypeError, ["q ", "float8_e4m3fn"]),
    Bad("dtype of k", {"k": Z(2, 2, 7, 8).double()}, TypeError, ["k ", "torch.float64", "torch.float32"]),
    Bad("dtype of v", {"v": Z(2, 2, 7, 6).half()}, TypeError, ["v ", "torch.float16", "torch.float32"]),
    Bad("device of k", {"k": Z(2, 2, 7, 8, device="meta")}, ValueError, ["k ", "meta", "cpu"]),
    Bad("device of q", {"q": Z(2, 4, 5, 8, device="meta")}, ValueError, ["k ", "cpu", "meta"]),
    Bad("device of lengths", {"kv_lengths": int32(1, 2).to("meta")}, ValueError, ["kv_lengths", "meta", "cpu"]),
    Bad("mask queries", {"mask": Z(4, 7).bool()}, ValueError, ["mask", "(2, 4, 5, 7)", "(4, 7)"]),
    Bad("mask keys", {"mask": Z(5, 6).bool()}, ValueError, ["mask", "(2, 4, 5, 7)", "(5, 6)"]),
    Bad("bias keys", {"bias": Z(2, 4, 5, 8)}, ValueError, ["bias", "(2, 4, 5, 7)", "(2, 4, 5, 8)"]),
    Bad("lengths past k", {"kv_lengths": int32(7, 8)}, ValueError, ["kv_lengths", "seqlen_k = 7", "kv_lengths[1] = 8"]),
)

VARLEN: dict[str, Any] = {"q": Z(5, 4, 8), "k": Z(9, 2, 8), "v": Z(9, 2, 6)}
VARLEN |= {"cu_seqlens_q": int32(0, 2, 5), "cu_seqlens_k": int32(0, 4, 9)}
VARLEN_BAD = (
    *OPTIONS,
    *TRAINING_OPTIONS,
    Bad("q rank", {"q": Z(1, 5, 4, 8)}, ValueError, ["q ", "(total_q, heads_q, head_dim)", "(1, 5, 4, 8)"]),
    Bad("k rank", {"k": Z(9, 8)}, ValueError, ["k ", "(total_k, heads_kv, head_dim)", "(9, 8)"]),
    Bad("v rank", {"v": Z(9, 6)}, ValueError, ["v ", "(total_k, heads_kv, head_dim_v)", "(9, 6)"]),
    Bad("tokens of v", {"v": Z(8, 2, 6)}, ValueError, ["v ", "(9, 2)", "(8, 2)"]),
    Bad("heads of v", {"v": Z(9, 1, 6)}, ValueError, ["v ", "(9, 2)", "(9, 1)"]),
    Bad("head_dim", {"k": Z(9, 2, 6)}, ValueError, ["k ", "(9, 2, 8)", "(9, 2, 6)"]),
    Bad("heads", {"q": Z(5, 3, 8)}, ValueError, ["heads of q", "multiple", "3 and 2"]),
    Bad("cu_q None", {"cu_seqlens_q": None}, TypeError, ["cu_seqlens_q", "int32", "None"]),
    Bad("cu_k list", {"cu_seqlens_k": [0, 4, 9]}, TypeError, ["cu_seqlens_k", "torch.Tensor", "list"]),
    Bad("cu_q int64", {"cu_seqlens_q": Z(3).long()}, TypeError, ["cu_seqlens_q", "torch.int32", "torch.int64"]),
    Bad("cu_k float", {"cu_seqlens_k": Z(3)}, TypeError, ["cu_seqlens_k", "torch.int32", "torch.float32"]),
    Bad("cu_k device", {"cu_seqlens_k": int32(0, 4, 9).to("meta")}, ValueError, ["cu_seqlens_k", "meta", "cpu"]),
    Bad("cu_q rank", {"cu_seqlens_q": int32(0, 2, 5)[None]}, ValueError, ["cu_seqlens_q", "(batch + 1,)", "(1, 3)"]),
    Bad("cu_q empty", {"cu_seqlens_q": int32()}, ValueError, ["cu_seqlens_q", "(batch + 1,)", "(0,)"]),
    Bad("cu lengths", {"cu_seqlens_q": int32(0, 5)}, ValueError, ["cu_seqlens_q", "cu_seqlens_k", "2 and 3"]),
    Bad("cu_q start", {"cu_seqlens_q": int32(1, 2, 5)}, ValueError, ["cu_seqlens_q", "begin with 0", "got 1"]),
    Bad("cu_k start", {"cu_seqlens_k": int32(-1, 2, 5)}, ValueError, ["cu_seqlens_k", "begin with 0", "got -1"]),
    Bad(
        "cu_q falls", {"cu_seqlens_q": int32(0, 4, 3)}, ValueError, ["cu_seqlens_q", "not decrease", "4 followed by 3"]
    ),
    Bad(
        "cu_k falls", {"cu_seqlens_k": int32(0, 9, 8)}, ValueError, ["cu_seqlens_k", "not decrease", "9 followed by 8"]
    ),
    Bad("cu_q end", {"cu_seqlens_q": int32(0, 2, 6)}, ValueError, ["cu_seqlens_q", "within the 5", "got 6"]),
    Bad("cu_k end", {"cu_seqlens_k": int32(0, 4, 10)}, ValueError, ["cu_seqlens_k", "within the 9", "got 10"]),
    Bad("lengths past keys", {"kv_lengths": int32(5, 5)}, ValueError, ["kv_lengths", "= 4", "kv_lengths[0] = 5"]),
    Bad("mask keys", {"mask": Z(3, 4).bool()}, ValueError, ["mask", "broadcastable", "(3, 4)", "heads_q, 3, 5"]),
    Bad("bias queries", {"bias": Z(2, 5)}, ValueError, ["bias", "broadcastable", "(2, 5)", "heads_q, 3, 5"]),
)

CACHE: dict[str, Any] = {"q": Z(2, 4, 5, 8), "k_cache": Z(2, 2, 9, 8), "v_cache": Z(2, 2, 9, 6)}
CACHE |= {"cache_lengths": int32(3, 6), "k_new": torch.ones(2, 2, 3, 8), "v_new": torch.ones(2, 2, 3, 6)}
PAGED = {**CACHE, "k_cache": Z(5, 2, 3, 8), "v_cache": Z(5, 2, 3, 6), "block_table": int32(0, 4, 9, 1, 2, 3).view(2, 3)}
COS, SIN = torch.ones(9, 4), Z(9, 4)
CACHE_BAD = (
    *OPTIONS,
    Bad("q rank", {"q": Z(4, 5, 8)}, ValueError, ["q ", "(batch, heads_q, seqlen_q, head_dim)", "(4, 5, 8)"]),
    Bad("q None", {"q": None}, TypeError, ["q ", "torch.Tensor", "NoneType"]),
    Bad("k_cache None", {"k_cache": None}, TypeError, ["k_cache", "torch.Tensor", "NoneType"]),
    Bad("v_cache list", {"v_cache": [1]}, TypeError, ["v_cache", "torch.Tensor", "list"]),
    Bad("k_cache rank", {"k_cache": Z(2, 9, 8)}, ValueError, ["k_cache", "capacity", "(2, 9, 8)"]),
    Bad("k_cache scalar", {"k_cache": torch.zeros(())}, ValueError, ["k_cache", "capacity", "()"]),
    Bad("v_cache rank", {"v_cache": Z(2, 9, 6)}, ValueError, ["v_cache", "capacity", "(2, 9, 6)"]),
    Bad("batch", {"k_cache": Z(3, 2, 9, 8)}, ValueError, ["k_cache", "(2, 2, 9, 8)", "(3, 2, 9, 8)"]),
    Bad("capacity", {"v_cache": Z(2, 2, 8, 6)}, ValueError, ["v_cache", "(2, 2, 9)", "(2, 2, 8)"]),
    Bad("head_dim", {"k_cache": Z(2, 2, 9, 4)}, ValueError, ["k_cache", "(2, 2, 9, 8)", "(2, 2, 9, 4)"]),
    Bad("heads", {"q": Z(2, 3, 5, 8)}, ValueError, ["heads of q", "multiple", "3 and 2"]),
    Bad("dtype", {"k_cache": Z(2, 2, 9, 8).half()}, TypeError, ["k_cache", "torch.float16", "torch.float32"]),
    Bad("q int", {"q": Z(2, 4, 5, 8).int()}, TypeError, ["q ", "float32", "torch.int32"]),
    Bad("device", {"v_cache": Z(2, 2, 9, 6, device="meta")}, ValueError, ["v_cache", "meta", "cpu"]),
    Bad("lengths None", {"cache_lengths": None}, TypeError, ["cache_lengths", "int32", "None"]),
    Bad("lengths list", {"cache_lengths": [3, 6]}, TypeError, ["cache_lengths", "torch.Tensor", "list"]),
    Bad("lengths int64", {"cache_lengths": Z(2).long()}, TypeError, ["cache_lengths", "torch.int32", "torch.int64"]),
    Bad("lengths shape", {"cache_lengths": int32(3)}, ValueError, ["cache_lengths", "(2,)", "got (1,)"]),
    Bad("lengths negative", {"cache_lengths": int32(-1, 6)}, ValueError, ["cache_lengths", "between 0", "[0] = -1"]),
    Bad("no room", {"cache_lengths": int32(3, 7)}, ValueError, ["cache_lengths", "capacity", "= 6", "[1] = 7"]),
    Bad("k_new alone", {"v_new": None}, ValueError, ["k_new", "v_new", "k_new without v_new"]),
    Bad("v_new alone", {"k_new": None}, ValueError, ["k_new", "v_new", "v_new without k_new"]),
    Bad("k_new rank", {"k_new": Z(2, 3, 8)}, ValueError, ["k_new", "seqlen_new", "(2, 3, 8)"]),
    Bad("k_new heads", {"k_new": Z(2, 4, 3, 8)}, ValueError, ["k_new", "(2, 2, 3, 8)", "(2, 4, 3, 8)"]),
    Bad("v_new tokens", {"v_new": Z(2, 2, 2, 6)}, ValueError, ["v_new", "(2, 2, 3, 6)", "(2, 2, 2, 6)"]),
    Bad("v_new head_dim", {"v_new": Z(2, 2, 3, 8)}, ValueError, ["v_new", "(2, 2, 3, 6)", "(2, 2, 3, 8)"]),
    Bad("k_new dtype", {"k_new": Z(2, 2, 3, 8).bfloat16()}, TypeError, ["k_new", "torch.bfloat16", "torch.float32"]),
    Bad("v_new device", {"v_new": Z(2, 2, 3, 6, device="meta")}, ValueError, ["v_new", "meta", "cpu"]),
    Bad("rotary tensor", {"rotary": COS}, TypeError, ["rotary", "Rotary(cos, sin", "Tensor"]),
    Bad("rotary of one", {"rotary": (COS,)}, TypeError, ["rotary", "Rotary(cos, sin", "tuple"]),
    Bad("rotary list of cos", {"rotary": Rotary([1.0], SIN)}, TypeError, ["rotary.cos", "torch.Tensor", "list"]),
    Bad("rotary rank", {"rotary": (Z(1, 9, 4), SIN)}, ValueError, ["rotary.cos", "max_positions", "(1, 9, 4)"]),
    Bad("rotary shapes", {"rotary": (COS, Z(9, 3))}, ValueError, ["rotary.sin", "(9, 4)", "(9, 3)"]),
    Bad("rotary too wide", {"rotary": (Z(9, 5), Z(9, 5))}, ValueError, ["rotary.cos", "5 columns", "head_dim 8"]),
    Bad("rotary int", {"rotary": (COS.int(), SIN)}, TypeError, ["rotary.cos", "floating", "torch.int32"]),
    Bad("rotary device", {"rotary": (COS, SIN.to("meta"))}, ValueError, ["rotary.sin", "meta", "cpu"]),
    Bad("rotary too short", {"rotary": (COS[:8], SIN[:8])}, ValueError, ["rotary.cos", "9 positions", "8 rows"]),
    Bad(
        "rotary too short for top-left queries",
        {"rotary": (COS, SIN), "q": Z(2, 4, 11, 8), "causal_alignment": "top-left"},
        ValueError,
        ["rotary.cos", "11 positions", "9 rows"],
    ),
    Bad(
        "rotary too short for the offset",
        {"rotary": (COS, SIN), "q_offset": int32(0, 5)},
        ValueError,
        ["rotary.cos", "10 positions", "9 rows"],
    ),
    Bad("rotary before 0", {"rotary": (COS, SIN), "q_offset": -1}, ValueError, ["q_offset", "at least 0", "got -1"]),
    Bad("mask", {"mask": Z(5, 8).bool()}, ValueError, ["mask", "(2, 4, 5, 9)", "(5, 8)"]),
    Bad("bias", {"bias": Z(4, 9)}, ValueError, ["bias", "(2, 4, 5, 9)", "(4, 9)"]),
    Bad("grad of q", {"q": Z(2, 4, 5, 8, requires_grad=True)}, ValueError, ["inference", "requires grad", "no_grad"]),
    Bad("grad of cache", {"v_cache": Z(2, 2, 9, 6, requires_grad=True)}, ValueError, ["inference", "no_grad"]),
    Bad("grad of k_new", {"k_new": Z(2, 2, 3, 8, requires_grad=True)}, ValueError, ["inference", "no_grad"]),
    Bad("grad of bias", {"bias": Z(5, 9, requires_grad=True)}, ValueError, ["inference", "no_grad"]),
)
PAGED_BAD = (
    Bad("table list", {"block_table": [[0]]}, TypeError, ["block_table", "torch.Tensor", "list"]),
    Bad("table int64", {"block_table": Z(2, 3).long()}, TypeError, ["block_table", "torch.int32", "torch.int64"]),
    Bad("table rank", {"block_table": int32(0, 4)}, ValueError, ["block_table", "(batch, max_pages)", "(2,)"]),
    Bad("table batch", {"block_table": Z(3, 3).int()}, ValueError, ["block_table", "(2, 3)", "(3, 3)"]),
    Bad("table device", {"block_table": Z(2, 3).int().to("meta")}, ValueError, ["block_table", "meta", "cpu"]),
    Bad(
        "table past the cache",
        {"block_table": int32(0, 4, 9, 1, 5, 3).view(2, 3)},
        ValueError,
        ["block_table", "between 0 and 4", "block_table[1, 1] = 5"],
    ),
    Bad(
        "table negative",
        {"block_table": int32(-1, 4, 9, 1, 2, 3).view(2, 3)},
        ValueError,
        ["block_table", "between 0 and 4", "block_table[0, 0] = -1"],
    ),
    Bad(
        "table too short",
        {"block_table": int32(0, 4, 1, 2).view(2, 2)},
        ValueError,
        ["cache_lengths", "capacity", "= 3", "[1] = 6"],
    ),
    Bad("page size 0", {"k_cache": Z(5, 2, 0, 8), "v_cache": Z(5, 2, 0, 6)}, ValueError, ["k_cache", "page_size"]),
    Bad("v pages", {"v_cache": Z(4, 2, 3, 6)}, ValueError, ["v_cache", "(5, 2, 3)", "(4, 2, 3)"]),
)


def test_the_good_calls_are_good() -> None:
    fastattn.attention(**DENSE)
    fastattn.attention_varlen(**VARLEN)
    for good in (CACHE, PAGED):
        own = {name: x.clone() for name, x in good.items()}
        fastattn.attention_with_kv_cache(**own, rotary=(COS, SIN))
        assert own["k_cache"].abs().max() > 0


@pytest.mark.parametrize("bad", DENSE_BAD, ids=str)
def test_attention(bad: Bad) -> None:
    bad.check(fastattn.attention, DENSE)


@pytest.mark.parametrize("bad", DENSE_BAD, ids=str)
def test_explain(bad: Bad) -> None:
    bad.check(fastattn.explain, DENSE)


@pytest.mark.parametrize("bad", [bad for bad in DENSE_BAD if "backend" not in bad.change], ids=str)
def test_reference_attention(bad: Bad) -> None:
    bad.check(fastattn.reference.attention, DENSE)


@pytest.mark.parametrize("bad", VARLEN_BAD, ids=str)
def test_varlen(bad: Bad) -> None:
    bad.check(fastattn.attention_varlen, VARLEN)


@pytest.mark.parametrize("bad", CACHE_BAD, ids=str)
def test_contiguous_kv_cache(bad: Bad) -> None:
    check_untouched(bad, CACHE)


@pytest.mark.parametrize("bad", [*OPTIONS, *PAGED_BAD], ids=str)
def test_paged_kv_cache(bad: Bad) -> None:
    check_untouched(bad, PAGED)


def check_untouched(bad: Bad, good: dict[str, Any]) -> None:
    """The call is refused, and the caches hold what they held."""
    own = {name: x.clone() if isinstance(x, Tensor) else x for name, x in good.items()}
    bad.check(fastattn.attention_with_kv_cache, own)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(own[name], good[name])
        assert own[name]._version == 0


def test_earlier_good_calls_do_not_excuse_bad_ones() -> None:
    """Descriptions of calls are cached; 1.0 and True must not pass because 1 once did."""
    for good, bad, name in (
        ({"window": (1, 0)}, {"window": (1.0, 0)}, "window"),
        ({"window": (1, 0)}, {"window": (True, 0)}, "window"),
        ({"scale": 1.0}, {"scale": True}, "scale"),
        ({"causal": True}, {"causal": 1}, "causal"),
        ({"softcap": 1}, {"softcap": True}, "softcap"),
    ):
        fastattn.attention(**DENSE, **good)
        with pytest.raises(TypeError, match=name):
            fastattn.attention(**DENSE, **bad)


@pytest.mark.parametrize("function", [fastattn.attention, fastattn.attention_with_kv_cache, fastattn.attention_varlen])
def test_options_are_keywords(function: Any) -> None:
    """A new option in the middle must never shift the others."""
    positional = {fastattn.attention: 3, fastattn.attention_with_kv_cache: 3, fastattn.attention_varlen: 5}[function]
    with pytest.raises(TypeError, match="positional argument"):
        function(*[Z(1)] * (positional + 1))


def test_inference_only_does_not_mind_no_grad() -> None:
    own = {name: x.clone() for name, x in CACHE.items()}
    own["q"].requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not fastattn.attention_with_kv_cache(**own).requires_grad


def test_the_generator_is_left_alone_by_a_given_seed_that_is_refused() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="seed"):
        fastattn.attention(**DENSE, dropout_p=0.5, seed=-3)
    assert torch.equal(torch.get_rng_state(), state)


def test_alibi_slopes_that_want_a_gradient_are_refused() -> None:
    q = torch.randn(1, 2, 3, 8)
    slopes = torch.rand(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"alibi_slopes has no gradient here.*detach"):
        fastattn.attention(q, q, q, alibi_slopes=slopes)
    with torch.no_grad():
        fastattn.attention(q, q, q, alibi_slopes=slopes)


@pytest.mark.parametrize("side", [2**31, 2**63 - 1, 2**70])
def test_windows_wider_than_anything_are_open(side: int, backend: str, device: str) -> None:
    q, k = torch.randn(1, 2, 12, 8, device=device), torch.randn(1, 2, 16, 8, device=device)
    expected = fastattn.attention(q, k, k, backend=backend)
    for window in ((side, None), (None, side), (side, side)):
        assert torch.equal(fastattn.attention(q, k, k, window=window, backend=backend), expected)


@pytest.mark.needs_dtype(torch.float32)
def test_negative_seed_tensor_is_refused(backend: str, device: str) -> None:
    q = torch.randn(1, 2, 3, 8, device=device)
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*63\), got -1"):
        fastattn.attention(q, q, q, dropout_p=0.5, seed=torch.tensor(-1), backend=backend)


def test_unusual_float_types_of_the_bias_are_refused(backend: str, device: str) -> None:
    q = torch.randn(1, 2, 3, 8, device=device)
    with pytest.raises(
        TypeError, match=r"bias must have dtype of floating point, float32, float64, bfloat16 or float16, got .*float8"
    ):
        fastattn.attention(q, q, q, bias=torch.zeros(3, 3, device=device).to(torch.float8_e4m3fn), backend=backend)


def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)])
    with pytest.raises(TypeError, match=r"q must be a dense .* got a nested tensor"):
        fastattn.attention(nested, nested, nested)
    with pytest.raises(TypeError, match=r"query must be a dense .* got a nested tensor"):
        fastattn.scaled_dot_product_attention(nested, nested, nested)


@pytest.mark.parametrize("options", [{"scale": 10**400}, {"softcap": 1e40}, {"scale": float("nan")}], ids=str)
def test_numbers_beyond_float32_are_refused(options: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="must be finite, and at most 1e30"):
        fastattn.attention(q, q, q, **options)
