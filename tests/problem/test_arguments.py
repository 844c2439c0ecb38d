"""What is written out beside the tables of arguments says the same: tuples, signatures, and the C++ side."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

import fastattn
from fastattn.autograd.call import DIFFERENTIABLE_AT, FORWARD_ARGUMENTS
from fastattn.problem import DIFFERENTIABLE, INDICES, PER_SEQUENCE, AttentionOptions, CacheOptions, Inputs, Options
from fastattn.problem.arguments import OPTIONS, TENSORS, OptionArgument, TensorArgument, of_kind
from fastattn.problem.values import LARGEST_OFFSET, OFFSETS

CALL = Path(__file__).parents[2] / "csrc" / "call"
FUNCTIONS = {
    "dense": fastattn.attention,
    "varlen": fastattn.attention_varlen,
    "cache": fastattn.attention_with_kv_cache,
}
KINDS = pytest.mark.parametrize("kind", FUNCTIONS)
PARTS = {
    "window_left": "window",
    "window_right": "window",
    "rotary_interleaved": "rotary",
    "cos": "rotary",
    "sin": "rotary",
}
"""Arguments that a caller gives as a part of another."""


def test_the_tuples_have_the_arguments_of_the_tables() -> None:
    assert Inputs._fields == tuple(x.name for x in TENSORS)
    assert Options._fields == tuple(x.name for x in OPTIONS)
    required = [x.name for x in TENSORS if len(x.required) == 3]
    assert required == [name for name in Inputs._fields if name not in Inputs._field_defaults]
    marked = Inputs(*Inputs._fields)  # type: ignore[arg-type]
    assert marked.differentiable == DIFFERENTIABLE


def test_operators_take_the_leading_fields() -> None:
    """`unflatten` cuts tuples where these end."""
    tensors, options = of_kind("dense")
    assert tensors == TENSORS[: len(tensors)]
    assert options == OPTIONS[: len(options)]
    assert of_kind("varlen") == (tensors, options)
    assert len(torch.ops.fastattn.forward.default._schema.arguments) - 1 == FORWARD_ARGUMENTS
    assert [Inputs._fields[at] for at in DIFFERENTIABLE_AT] == list(DIFFERENTIABLE)


@pytest.mark.parametrize(("kind", "operator"), [("dense", "forward"), ("cache", "cache")])
def test_schemas(kind: str, operator: str) -> None:
    """Torch has understood them as they are meant: which are tensors, which may be None, which are written to."""
    found = getattr(torch.ops.fastattn, operator).default._schema.arguments
    tensors, options = of_kind(kind)
    rest = ["backend", "for_backward"] if operator == "forward" else ["backend"]
    assert [argument.name for argument in found][len(tensors) + len(options) :] == rest
    for argument, x in zip(found, (*tensors, *options), strict=False):
        if isinstance(x, OptionArgument):
            assert argument.name == x.name
            assert (str(argument.type).startswith("Optional")) == x.type.endswith("?")
            continue
        assert argument.name in (x.name, (x.cache_name or "").rpartition(".")[2])
        assert str(argument.type) == ("Tensor" if kind in x.required else "Optional[Tensor]")
        assert argument.is_write == (kind in x.written)


@KINDS
def test_the_public_functions_have_the_arguments_of_their_kind(kind: str) -> None:
    given = set(inspect.signature(FUNCTIONS[kind]).parameters) - {"return_lse", "backend"}
    tensors, options = of_kind(kind)
    names = {x.cache_name or x.name if kind == "cache" and x.name not in PARTS else x.name for x in tensors}
    wanted = {PARTS.get(name, name) for name in (*names, *(x.name for x in options))}
    wanted -= {"dropout_p"} if kind == "cache" else set()  # of no use without gradients
    wanted -= {"cu_seqlens_q", "cu_seqlens_k"} if kind == "dense" else set()
    assert given == wanted


def test_keyword_types_are_those_of_the_functions() -> None:
    extra = {"return_lse", "backend"}
    for function, keywords in (
        (fastattn.attention, AttentionOptions),
        (fastattn.attention_with_kv_cache, CacheOptions),
    ):
        parameters = inspect.signature(function).parameters.values()
        keyword_only = {x.name for x in parameters if x.kind is x.KEYWORD_ONLY}
        assert keyword_only - extra == set(get_type_hints(keywords))


def test_per_sequence_tensors() -> None:
    assert PER_SEQUENCE == ("kv_lengths", "q_offset")


@pytest.mark.parametrize("argument", TENSORS, ids=lambda x: x.name)
def test_dtypes(argument: TensorArgument) -> None:
    assert argument.dtype in ("q", "float", "bool", "int32", "int64")
    assert set(argument.required) <= set(argument.kinds)
    assert not (argument.differentiable and argument.dtype not in ("q", "float"))


# -------------------------------------------------------------------------------------------------------- the C++ side


def table(name: str) -> list[str]:
    """The names in one of the tables of description.h."""
    text = (CALL / "description.h").read_text()
    found = re.search(rf"{name}\[\] = \{{(.*?)\n?\}};", text, re.DOTALL)
    assert found is not None, f"description.h has no table {name}"
    return re.findall(r'\{"(\w+)", &Params::\w+\}', found.group(1))


def test_native_tables_have_every_tensor() -> None:
    """Each argument by its name, in the table of its kind, and each gradient."""
    gradients = [f"d{name}" for name in DIFFERENTIABLE]
    results = ["out", "lse", "residual", "dout", "dlse"]
    views = {x.name for x in TENSORS} - {*INDICES, "cos", "sin", "seed"}
    assert set(table("kTensors")) == views | {*gradients, *results}
    assert set(table("kIndices")) == set(INDICES)
    assert set(table("kTables")) == {"cos", "sin"}


def test_native_params_have_every_argument() -> None:
    """A field of the same name, except ALiBi's slopes, and the options that Python turns into others."""
    text = (CALL / "params.h").read_text()
    body = text[text.index("struct Params {") : text.index("\n};", text.index("struct Params {"))]
    body = re.sub(r"//.*", "", body)
    fields = set(re.findall(r"(?<=[\s,*])(\w+)(?:\[\d\])?\s*(?:=[^,;]*)?(?=[,;])", body))
    renamed = {
        "alibi_slopes": "alibi",
        "causal": "window_right",
        "causal_alignment": "bottom_right",
        "dropout_p": "dropout_threshold",
    }
    wanted = {renamed.get(x.name, x.name) for x in (*TENSORS, *OPTIONS)}
    assert wanted <= fields, f"params.h lacks {sorted(wanted - fields)}"


def test_kernels_bound_offsets_as_the_checks_do() -> None:
    """On GPUs nobody checks them, and both languages spell the number again."""
    power = LARGEST_OFFSET.bit_length() - 1
    assert 2**power == LARGEST_OFFSET
    assert f"kLargest = int64_t(1) << {power};" in (CALL / "params.h").read_text()
    assert (
        f"tl.maximum(given, -(2**{power})), 2**{power})" in (CALL.parents[1] / "kernels" / "block_info.py").read_text()
    )
    assert f"-2**{power} and 2**{power}" in OFFSETS
