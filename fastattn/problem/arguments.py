"""Every argument of a call, once.

The operators' schemas, the positions of arguments, and the checks of dtypes and simple shapes are made from these two
tables; so are the tensors that have gradients, and the dimensions that vmap and sharding need. What a reader wants to
see in one place stays written out elsewhere (`Inputs`, `Options`, the public signatures, csrc/call), and
tests/problem/test_arguments.py holds it to the tables.
"""

from __future__ import annotations

from typing import NamedTuple

NO_CACHE = ("dense", "varlen")
CACHE = ("cache",)
ALL = (*NO_CACHE, *CACHE)
"""Kinds of calls."""


class TensorArgument(NamedTuple):
    """A tensor that a call may have.

    dtype: "q" for that of q, else "float" (any floating point), "bool", "int32" or "int64".
    kinds: of the calls that take it. required: of those that must have it. written: of those that write to it.
    shapes: what its shape may be. "(...)" stands for whatever broadcasts to (batch, heads_q, seqlen_q, seqlen_k). Empty
    if its shape says how large the call is: see shapes.py.
    feature: its word in `Problem.features`.
    cache_name: its name in a call with a cache, where that is another.
    """

    name: str
    dtype: str
    kinds: tuple[str, ...] = ALL
    required: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    feature: str | None = None
    differentiable: bool = False
    cache_name: str | None = None
    written: tuple[str, ...] = ()


class OptionArgument(NamedTuple):
    """Anything else; type: that of the operators' schemas."""

    name: str
    type: str
    kinds: tuple[str, ...] = ALL


TENSORS = (
    TensorArgument("q", "q", required=ALL, differentiable=True),
    TensorArgument("k", "q", required=ALL, differentiable=True, cache_name="k_cache", written=CACHE),
    TensorArgument("v", "q", required=ALL, differentiable=True, cache_name="v_cache", written=CACHE),
    TensorArgument("mask", "bool", shapes=("(...)",), feature="mask"),
    TensorArgument("bias", "float", shapes=("(...)",), feature="bias", differentiable=True),
    TensorArgument("alibi_slopes", "float", shapes=("(heads_q,)", "(batch, heads_q)"), feature="alibi"),
    TensorArgument("sinks", "float", shapes=("(heads_q,)",), feature="sinks", differentiable=True),
    TensorArgument(
        *("kv_lengths", "int32"),
        required=CACHE,
        shapes=("(batch,)",),
        feature="kv_lengths",
        cache_name="cache_lengths",
    ),
    TensorArgument("q_offset", "int32", shapes=("(batch,)",), feature="q_offset"),
    TensorArgument("cu_seqlens_q", "int32", NO_CACHE),
    TensorArgument("cu_seqlens_k", "int32", NO_CACHE),
    TensorArgument("seed", "int64", NO_CACHE),
    TensorArgument("k_new", "q", CACHE, feature="append"),
    TensorArgument("v_new", "q", CACHE),
    TensorArgument("block_table", "int32", CACHE, feature="paged"),
    TensorArgument("cos", "float", CACHE, feature="rotary", cache_name="rotary.cos"),
    TensorArgument("sin", "float", CACHE, cache_name="rotary.sin"),
)

OPTIONS = (
    OptionArgument("causal", "bool"),
    OptionArgument("window_left", "SymInt?"),
    OptionArgument("window_right", "SymInt?"),
    OptionArgument("causal_alignment", "str"),
    OptionArgument("softcap", "float?"),
    OptionArgument("scale", "float?"),
    OptionArgument("dropout_p", "float"),
    OptionArgument("rotary_interleaved", "bool", CACHE),
)


def of_kind(kind: str) -> tuple[tuple[TensorArgument, ...], tuple[OptionArgument, ...]]:
    """The arguments of a kind of call, in the order of its operator."""
    return tuple([x for x in TENSORS if kind in x.kinds]), tuple([x for x in OPTIONS if kind in x.kinds])


def schema(kind: str) -> str:
    """These arguments as operators declare them."""
    tensors, options = of_kind(kind)
    declared = []
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    for x in tensors:
        name = (x.cache_name or x.name) if kind == "cache" else x.name
        alias = f"({next(letters)}!)" if kind in x.written else ""
        declared.append(f"Tensor{alias}{'' if kind in x.required else '?'} {name.rpartition('.')[2]}")
    return ", ".join([*declared, *(f"{x.type} {x.name}" for x in options)])


DIFFERENTIABLE = tuple([x.name for x in TENSORS if x.differentiable])
"""The tensors that have gradients, in the order of the operator `backward`."""

INDICES = tuple([x.name for x in TENSORS if x.dtype == "int32"])
"""The tensors that kernels read as contiguous integers."""

PER_SEQUENCE = tuple([x.name for x in TENSORS if x.shapes == ("(batch,)",)])
"""The tensors of one number for each sequence."""

CACHE_NAMES = {x.name: x.cache_name for x in TENSORS if x.cache_name is not None}
"""How messages name the arguments of a call with a cache, where the names differ from those of `Inputs`."""
