"""A plan says what the library's mask says, takes no S x S memory, and becomes that mask if computed with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from fastattn.integrations import huggingface
from fastattn.integrations.huggingface.masks import PlannedMask, make_mask
from fastattn.integrations.huggingface.patterns import read_pattern
from tests.integrations import huggingface_models as models
from tests.integrations.huggingface_models import ARCHITECTURES, VERSION, build

huggingface.register()

BATCH = 3


class Geometry(NamedTuple):
    """Where queries and keys stand."""

    q_length: int
    kv_length: int
    q_offset: int = 0
    kv_offset: int = 0


GEOMETRIES = {
    "prefill": Geometry(6, 6),
    "decoding": Geometry(1, 6, 5),
    "more tokens": Geometry(3, 9, 6),
    "empty static cache": Geometry(6, 11),
    "static cache": Geometry(3, 11, 4),
    "sliding cache": Geometry(4, 7, 9, 6),
    "cross": Geometry(4, 7),
    "queries past the keys": Geometry(5, 4, 2),
    "keys ahead of queries": Geometry(4, 6, 1, 3),
    "all keys ahead": Geometry(2, 6, 0, 3),
}


def padding(kind: str, positions: int) -> Tensor | None:
    index, lengths = torch.arange(positions), torch.tensor([positions, positions - 2, 1])[:, None]
    return {
        "none": None,
        "all real": index >= 0 * lengths,
        "right": index < lengths,
        "left": index >= positions - lengths,
        "holes": (index * lengths) % 3 != 1,
        "nothing": (index < lengths) & (torch.arange(BATCH)[:, None] != 1),
        "too short": (index < lengths)[:, : positions - 1],
        "too long": torch.nn.functional.pad(index < lengths, (0, 2), value=True),
    }[kind]


PADDINGS = ("none", "all real", "right", "left", "holes", "nothing", "too short", "too long")


def packed(mask_function: Callable[..., Any], positions: list[list[int]]) -> Callable[..., Any]:
    """As the library composes it for position_ids that begin again."""
    library: Any = masking_utils
    position_ids = torch.tensor(positions)
    if hasattr(library, "remap_positions_for_packed_sequence"):
        mask_function = library.remap_positions_for_packed_sequence(mask_function, position_ids)
    steps = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1)
    return library.and_masks(mask_function, library.packed_sequence_mask_function((steps != 1).cumsum(1)))


def said() -> dict[str, Callable[..., Any]]:
    """Mask functions that plans can say."""
    library: Any = masking_utils
    positions = [[0, 1, 2, 0, 1, 2], [4, 5, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]]
    found = {
        "causal": library.causal_mask_function,
        "sliding": library.sliding_window_causal_mask_function(3),
        "sliding by one": library.sliding_window_causal_mask_function(1),
        "packed": packed(library.causal_mask_function, positions),
        "packed, sliding": packed(library.sliding_window_causal_mask_function(2), positions),
        "packed in name": packed(library.causal_mask_function, [[3, 4, 5, 6, 7, 8]] * 3),
    }
    if VERSION >= (5, 0):
        found["bidirectional"] = library.bidirectional_mask_function
        found["bidirectional, sliding"] = library.sliding_window_bidirectional_mask_function(2)
    return found


def not_said() -> dict[str, Callable[..., Any]]:
    """Others, of the library and of users: they are spelled out."""
    library: Any = masking_utils
    causal = library.causal_mask_function

    def prefix(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx < 3

    def lookalike(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx < q_idx

    lookalike.__name__ = "causal_mask_function"
    scattered = torch.tensor([[0, 1, 0, 1, 0, 1]] * 3)
    found = {
        "or": library.or_masks(causal, prefix),
        "and": library.and_masks(causal, prefix),
        "own": lookalike,
        "chunked": library.chunked_causal_mask_function(3, torch.tensor([0, 1, 2])),
        "padding": library.and_masks(causal, library.padding_mask_function(torch.ones(3, 20, dtype=torch.bool))),
        "sequences in pieces": library.and_masks(causal, library.packed_sequence_mask_function(scattered)),
        "no window": library.sliding_window_causal_mask_function(0),
    }
    if VERSION >= (5, 0):
        found["blocks"] = library.or_masks(causal, library.blockwise_overlay(torch.tensor([[0, 0, 1, 1, -1, 2]] * 3)))
    if hasattr(library, "remap_positions_for_packed_sequence"):
        positions = torch.tensor([[0, 1, 2, 2, 1, 0]] * 3)
        jumping = torch.tensor([[0, 2, 1, 3, 5, 4]] * 3)
        found["remapped, jumping"] = library.and_masks(
            library.remap_positions_for_packed_sequence(causal, jumping),
            library.packed_sequence_mask_function(torch.zeros_like(jumping)),
        )
        found["remapped alone"] = library.remap_positions_for_packed_sequence(causal, positions)
    return found


def describe(geometry: Geometry, function: Callable[..., Any], mask: Tensor | None, **options: Any) -> dict[str, Any]:
    """The call in the terms of the version that is installed."""
    if VERSION >= (5, 0):
        queries: dict[str, Any] = {"q_length": geometry.q_length, "q_offset": geometry.q_offset}
    else:
        queries = {"cache_position": torch.arange(geometry.q_length) + geometry.q_offset}
    return {
        "batch_size": BATCH,
        "kv_length": geometry.kv_length,
        "kv_offset": geometry.kv_offset,
        "mask_function": function,
        "attention_mask": mask,
        "use_vmap": VERSION < (5, 0),
        "dtype": torch.float64,
        **queries,
        **options,
    }


def library_mask(call: dict[str, Any]) -> Tensor:
    return masking_utils.sdpa_mask(**{**call, "allow_is_causal_skip": False})


def attend(mask: Tensor | None, geometry: Geometry, exact: bool = False) -> tuple[Tensor, ...]:
    """out and gradients of q, k, v; keys that no query sees hold NaN unless `exact`."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(BATCH, heads, n, 4) for heads, n in ((4, geometry.q_length), *[(2, geometry.kv_length)] * 2)]
    q, k, v = (torch.randn(x, dtype=torch.float64, generator=generator).requires_grad_() for x in shapes)
    module = torch.nn.Module()
    function = models._exact if exact else huggingface.attention_forward
    out, _ = function(module, q, k, v, mask)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    return out, *torch.autograd.grad(out, (q, k, v), weight)


def check_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], where: str) -> None:
    for name, x, exact in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(x, exact, rtol=1e-10, atol=1e-12, msg=lambda text: f"{name}, {where}: {text}")  # noqa: B023


CASES = [(name, function, True) for name, function in said().items()]
CASES += [(name, function, False) for name, function in not_said().items()]


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize(("name", "function", "sayable"), CASES, ids=[case[0] for case in CASES])
def test_means_what_the_library_says(name: str, function: Callable[..., Any], sayable: bool, kind: str) -> None:
    for where, geometry in GEOMETRIES.items():
        if (name.startswith(("packed", "sequences", "remapped")) or name == "blocks") and where != "prefill":
            continue  # their tensors have one entry for each of 6 tokens
        call = describe(geometry, function, padding(kind, geometry.kv_length + geometry.kv_offset))
        expected, mask = library_mask(call), make_mask(**call)
        assert isinstance(mask, PlannedMask)
        assert (mask.plan is not None) <= sayable, where
        assert mask.shape == expected.shape, where
        check_equal(attend(mask, geometry), attend(expected, geometry, exact=True), where)
        assert torch.equal(mask.seen(), expected), where
        assert torch.equal(mask.added() == 0, expected), where


@pytest.mark.parametrize("name", said())
def test_is_planned(name: str) -> None:
    """All that can be said is said: a plan that is never made would pass the test above."""
    function = said()[name]
    planned = set()
    for where, geometry in GEOMETRIES.items():
        if name.startswith("packed") and where != "prefill":
            continue
        for kind in ("none", "right", "left"):
            call = describe(geometry, function, padding(kind, geometry.kv_length + geometry.kv_offset))
            if make_mask(**call).plan is not None:  # type: ignore[attr-defined]
                planned.add((where, kind))
    if name == "bidirectional":
        assert len(planned) == 3 * len(GEOMETRIES)
    elif name == "packed in name":
        assert ("prefill", "none") in planned
    elif name.startswith("packed"):
        assert planned == {("prefill", "none")}
    elif name == "bidirectional, sliding":
        assert {where for where, _ in planned} >= {"prefill", "cross", "decoding", "more tokens", "sliding cache"}
    else:
        places = GEOMETRIES.keys() - {"queries past the keys", "all keys ahead"}
        assert planned == {(where, kind) for where in places for kind in ("none", "right", "left")}


def test_unknown_parts_are_not_read() -> None:
    assert all(read_pattern(function) is None for name, function in not_said().items() if name in ("or", "and", "own"))
    assert read_pattern(torch.nn.Identity()) is None


def test_what_is_passed_instead() -> None:
    """Lengths for padding on the right, a row for padding on the left, nothing where there is none."""
    library: Any = masking_utils
    sliding, prefill = library.sliding_window_causal_mask_function(3), GEOMETRIES["prefill"]
    plans = {
        kind: make_mask(**describe(prefill, sliding, padding(kind, 6))).plan  # type: ignore[attr-defined]
        for kind in ("none", "all real", "right", "left")
    }
    assert plans["none"] == plans["all real"]
    assert all((plan.causal, plan.window, plan.seqlen_k) == (True, (2, None), 6) for plan in plans.values())
    assert plans["none"].kv_lengths is None
    assert plans["none"].key_mask is None
    assert plans["right"].kv_lengths.tolist() == [6, 4, 1]
    assert plans["right"].causal_alignment == "top-left"
    assert plans["left"].key_mask.shape == (3, 1, 1, 6)
    static = make_mask(**describe(GEOMETRIES["static cache"], sliding, None)).plan  # type: ignore[attr-defined]
    assert static.seqlen_k == 7
    positions = [[0, 1, 2, 0, 1, 2], [4, 5, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]]
    sequences = make_mask(**describe(prefill, packed(library.causal_mask_function, positions), None)).plan  # type: ignore[attr-defined]
    assert sequences.cu_seqlens.tolist() == [0, 3, 6, 8, 10, 11, 12, 18]
    assert sequences.cu_seqlens.dtype == torch.int32


class SquareTensors(TorchDispatchMode):
    """Collects the operations that give a tensor whose last dimensions are (size, size)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            planned = isinstance(x, PlannedMask)
            if isinstance(x, Tensor) and not planned and x.shape[-2:] == (self.size, self.size):
                self.found.add(str(func))
        return result


LONG = 60  # no other size of the models


DECODERS = ("Llama", "Mistral", "Gemma 2", "gpt-oss", "GPT-2")
ENCODERS = tuple(name for name in ("BERT", "ModernBERT") if ARCHITECTURES[name].needs <= VERSION)


@pytest.mark.parametrize(
    ("name", "side"),
    # The library packs sequences in decoders only.
    [(name, side) for name in DECODERS for side in ("none", "left", "right", "packed")]
    + [(name, side) for name in ENCODERS for side in ("none", "left", "right")],
)
def test_no_square_of_the_sequence(name: str, side: str) -> None:
    inputs = models.tokens(side.replace("packed", "none"), LONG)
    if side == "packed":
        inputs = {"input_ids": inputs["input_ids"], "position_ids": (torch.arange(LONG) % 25).repeat(3, 1)}
    squares = {}
    for implementation in ("eager", "fastattn"):
        with SquareTensors(LONG) as mode:
            caching = {"use_cache": False} if name in DECODERS else {}
            build(name, implementation)(**inputs, **caching).logits.sum().backward()
        squares[implementation] = mode.found
    assert squares["eager"]
    assert not squares["fastattn"]


@pytest.fixture
def mask() -> PlannedMask:
    call = describe(GEOMETRIES["prefill"], masking_utils.causal_mask_function, padding("left", 6))
    made = make_mask(**call)
    assert isinstance(made, PlannedMask)
    assert made.plan is not None
    return made


def test_computing_with_a_planned_mask(mask: PlannedMask) -> None:
    """It is what eager attention would be given, in meaning and dtype."""
    call = describe(GEOMETRIES["prefill"], masking_utils.causal_mask_function, padding("left", 6))
    expected = masking_utils.eager_mask(**call)
    assert (mask.shape, mask.ndim, mask.dtype, mask.device) == (expected.shape, 4, torch.float64, expected.device)
    assert mask.contiguous() is mask  # what generate() does with it
    assert torch.equal(mask.added(), expected)
    scores = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    assert torch.equal(scores + mask, scores + expected)
    assert torch.equal(mask + scores, expected + scores)
    assert torch.equal(mask == 0, expected == 0)
    assert torch.equal(torch.where(scores > 0, mask, -1.0), torch.where(scores > 0, expected, -1.0))
    more = torch.tensor([0.0, -torch.inf]).expand(3, 1, 6, 2)
    assert torch.equal(torch.cat([mask, more.to(mask.dtype)], -1), torch.cat([expected, more.double()], -1))
    assert torch.equal(torch.nn.functional.pad(mask, (0, 2)), torch.nn.functional.pad(expected, (0, 2)))
    assert torch.equal(mask.masked_fill(scores[:, :1] > 0, -9.0), expected.masked_fill(scores[:, :1] > 0, -9.0))
    assert "PlannedMask(shape=(3, 1, 6, 6), dtype=torch.float64, plan=MaskPlan(" in repr(mask)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[:, :, 2:, :4],
    "expand": lambda x: x.expand(3, 4, 6, 6),
    "transpose": lambda x: x.transpose(1, 2),
    "view": lambda x: x.view(3, 6, 6),
    "unbind": lambda x: x.unbind(0)[1],
    "select": lambda x: x[1],
}


@pytest.mark.parametrize("view", VIEWS)
def test_parts_of_a_planned_mask(mask: PlannedMask, view: str) -> None:
    """They have its meaning, and are still refused where that would be lost."""
    part, expected = VIEWS[view](mask), VIEWS[view](mask.added().clone())
    assert part.shape == expected.shape
    assert torch.equal(part + 0.0, expected)
    with pytest.raises(ValueError, match="not known to keep that meaning"):
        part.bool()
    if part.ndim == 4 and view != "transpose":
        assert isinstance(part, PlannedMask)
        assert torch.equal(part.seen(), expected)


OTHER_MEANINGS: dict[str, Callable[[Tensor], Any]] = {
    '"_to_copy to torch.bool"': lambda x: x.bool(),
    '"_to_copy to torch.int64"': lambda x: x.long(),
    '"logical_not"': lambda x: x.logical_not(),
    '"logical_and"': lambda x: x.logical_and(x),
    '"sum"': lambda x: x.sum(-1),
    '"all"': lambda x: x.all(),
    '"mul"': lambda x: x * 2.0,
    '"rsub"': lambda x: 1.0 - x,
    '"exp"': lambda x: x.exp(),
    '"tril"': lambda x: x.tril(),
    '"copy_ to torch.bool"': lambda x: torch.ones(3, 1, 6, 6, dtype=torch.bool).copy_(x),
}


@pytest.mark.parametrize("operation", OTHER_MEANINGS)
def test_operations_with_another_meaning_are_refused(mask: PlannedMask, operation: str) -> None:
    """What is not on the list of those that keep it; True would mean the opposite of what it does for sdpa."""
    with pytest.raises(
        ValueError, match=f"This model applies {operation} to the attention mask of attn_implementation="
    ):
        OTHER_MEANINGS[operation](mask)


SEEN = torch.ones(3, 1, 6, 6, dtype=torch.bool)
BOOLEANS: dict[str, Callable[[Tensor], Any]] = {
    "cat": lambda x: torch.cat([x, SEEN], -1),
    "cat first": lambda x: torch.cat([SEEN, x], -1),
    "stack": lambda x: torch.stack([x, SEEN]),
    "pad": lambda x: torch.nn.functional.pad(x, (0, 2), value=True),
    "pad, False": lambda x: torch.nn.functional.pad(x, (0, 2), "constant", False),
    "masked_fill": lambda x: x.masked_fill(SEEN, True),
    "masked_fill_": lambda x: x.masked_fill_(SEEN, False),
    "masked_fill, tensor": lambda x: x.masked_fill(SEEN, torch.tensor(True)),
    "setitem": lambda x: x.__setitem__((..., 0), False),
    "setitem, tensor": lambda x: x.__setitem__((..., 0), SEEN[..., 0]),
    "setitem, where": lambda x: x.__setitem__(SEEN, False),
    "setitem of a slice": lambda x: x[:, :, 1:].__setitem__(slice(1), True),
    "eq": lambda x: x == True,  # noqa: E712
    "ne": lambda x: x != False,  # noqa: E712
    "eq, tensor": lambda x: x == SEEN,
    "where": lambda x: torch.where(SEEN, x, False),
    "where, tensor": lambda x: torch.where(SEEN, SEEN, x),
    "fill_": lambda x: x.fill_(True),
    "full_like": lambda x: torch.full_like(x, True),
    "new_full": lambda x: x.new_full((2, 2), False),
    "add": lambda x: x + True,
    "add, tensor": lambda x: x + SEEN,
    "minimum": lambda x: torch.minimum(x, SEEN),
    "copy_": lambda x: x.copy_(SEEN),
    "index_put_": lambda x: x.index_put_((torch.tensor(0),), torch.tensor(False)),
}


@pytest.mark.parametrize("operation", BOOLEANS)
def test_booleans_beside_its_numbers_are_refused(mask: PlannedMask, operation: str) -> None:
    """True is "attend" for sdpa; as a number it would be added to scores."""
    before = mask.added().clone()
    with pytest.raises(ValueError, match=r"This model applies .* with booleans.* to the attention mask of"):
        BOOLEANS[operation](mask)
    assert torch.equal(mask.added(), before)


def test_booleans_that_choose_are_not(mask: PlannedMask) -> None:
    expected = mask.added().clone()
    assert torch.equal(mask[SEEN], expected[SEEN])
    assert torch.equal(mask.masked_fill(SEEN, -1.0), expected.masked_fill(SEEN, -1.0))
    assert torch.equal(mask.to(torch.float32, copy=True) == 0, expected == 0)
    mask[SEEN] = 0.0
    mask.index_put_((SEEN,), torch.tensor(1.0, dtype=mask.dtype), accumulate=True)
    assert (mask.added() == 1).all()


def test_booleans_are_no_masks_of_this_kind(mask: PlannedMask) -> None:
    """Operations that torch itself has for booleans only."""
    with pytest.raises((RuntimeError, ValueError)):
        torch.zeros(3, 1, 6, 6).masked_fill(mask, 1.0)
    with pytest.raises((RuntimeError, ValueError)):
        torch.where(mask, 0.0, -1.0)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        mask.bitwise_not()


def test_copies_of_a_planned_mask(mask: PlannedMask) -> None:
    """Deep, or into memory that processes share: plain tensors."""
    copied, shared = copy.deepcopy({"mask": mask})["mask"], mask.share_memory_()
    assert type(copied) is type(shared) is torch.Tensor
    assert shared.is_shared()
    assert torch.equal(copied, mask.added())
    assert torch.equal(shared, copied)
    copied[:] = -1.0
    assert (mask.added() == 0).any()


def test_a_clone_or_another_precision_keeps_the_plan(mask: PlannedMask) -> None:
    for same in (mask.clone(), mask.to(torch.bfloat16)):
        assert isinstance(same, PlannedMask)
        assert same.plan == mask.plan
        assert same.shape == mask.shape
        assert torch.equal(same.added() == 0, mask.added() == 0)
    assert mask.to(torch.bfloat16).dtype == torch.bfloat16
    clone = mask.clone()
    clone[:] = 0.0
    assert clone.plan is None
    assert mask.plan is not None


def test_a_changed_mask_has_no_plan(mask: PlannedMask) -> None:
    twin = mask.detach()
    mask[:, :, :, 3] = 0.0
    assert twin.plan is None
    assert mask.plan is None
    changed = mask.added().clone()
    assert (changed[:, :, :, 3] == 0).all()
    assert (changed < 0).any()
    found = attend(mask, GEOMETRIES["prefill"])
    check_equal(found, attend(changed, GEOMETRIES["prefill"], exact=True), "changed")
    assert mask.masked_fill_(changed < 0, 0.0) is mask
    assert (mask.added() == 0).all()


def test_scores_that_a_mask_is_added_to_in_place(mask: PlannedMask) -> None:
    """It is not the mask that changes."""
    scores = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    expected = scores + mask.added()
    scores += mask
    assert torch.equal(scores, expected)
    assert mask.plan is not None


def test_a_detached_mask_keeps_its_plan(mask: PlannedMask) -> None:
    detached = mask.detach()
    assert isinstance(detached, PlannedMask)
    assert detached.plan == mask.plan


def test_a_cache_that_counts_on_does_not_move_the_mask() -> None:
    """Static caches count in place; the mask is of the moment that it was made in."""
    count = torch.tensor(4)
    call = describe(GEOMETRIES["static cache"], masking_utils.causal_mask_function, None)
    call |= {"q_offset": count} if VERSION >= (5, 0) else {"cache_position": count + torch.arange(3)}
    made, expected = make_mask(**call), library_mask(call)
    assert isinstance(made, PlannedMask)
    count += 3
    assert made.plan is not None
    assert made.plan.seqlen_k == 7
    assert torch.equal(made.seen(), expected)


@pytest.mark.skipif(VERSION >= (5, 0), reason="transformers 5 gives no cache_position")
def test_scattered_queries_are_spelled_out() -> None:
    call = describe(GEOMETRIES["prefill"], masking_utils.causal_mask_function, None)
    call["cache_position"] = torch.tensor([0, 1, 2, 4, 5, 6])
    made = make_mask(**call)
    assert isinstance(made, PlannedMask)
    assert made.plan is None
    assert torch.equal(made.seen(), library_mask(call))


def test_static_decoding_gets_a_tensor() -> None:
    """generate() compiles that step; a mask of one row is linear."""
    call = describe(Geometry(1, 11, 5), masking_utils.causal_mask_function, None, allow_is_causal_skip=False)
    made = make_mask(**call)
    assert type(made) is torch.Tensor
    assert made.shape == (BATCH, 1, 1, 11)


def test_a_version_that_describes_masks_in_another_way() -> None:
    call = describe(GEOMETRIES["prefill"], masking_utils.causal_mask_function, None)
    for name in ("q_length", "cache_position"):
        call.pop(name, None)
    with pytest.raises(TypeError, match="this version of transformers describes its masks in another way"):
        make_mask(**call)
