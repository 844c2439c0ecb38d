"""Masks of Hugging Face Transformers as `fastattn.attention` is told them: lengths, windows and causality.

A model of that library says what a query may see by a function of positions and a two-dimensional padding mask, and
has its attention implementation turn both into something. Here they become a `MaskPlan`, linear in the sequence,
wherever the function is made of parts that are known; any other is spelled out by the library, as a boolean tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import masking_utils

from .huggingface_patterns import Pattern, read_pattern


@dataclass(frozen=True)
class MaskPlan:
    """What `fastattn.attention` is told instead of a mask.

    Fields of the same names are its arguments, but for

        seqlen_k    keys at or past it are hidden from every query: the unused rest of a static cache
        key_mask    (batch, 1, 1, seqlen_k), bool: the padding, where lengths alone cannot say it
        cu_seqlens  (sequences + 1,), int32: bounds of the sequences packed into the batch * seqlen tokens
    """

    seqlen_k: int
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    causal_alignment: str = "bottom-right"
    kv_lengths: Tensor | None = None
    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @cached_property
    def options(self) -> dict[str, Any]:
        """What is seen, as arguments of `fastattn.attention` on the first seqlen_k keys; not of packed sequences.

        Made once, as every layer of a model asks for them.
        """
        return {
            "causal": self.causal,
            "window": self.window,
            "causal_alignment": self.causal_alignment,
            "kv_lengths": self.kv_lengths,
            "mask": self.key_mask,
        }


class PlannedMask(torch.Tensor):
    """A bool mask (batch, 1, seqlen_q, seqlen_k), True = attend, that takes no memory until something computes with it.

    Models hand it from layer to layer like a tensor, and the attention function reads its plan. A model that slices,
    moves or adds to it gets the tensor which the library itself would have made: slower, and right.
    """

    _content: _Content

    @staticmethod
    def __new__(cls, content: _Content, shape: torch.Size, device: torch.device) -> PlannedMask:
        """A tensor of this shape; `content` is shared with those detached from it."""
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        self._content = content
        return self

    @property
    def plan(self) -> MaskPlan | None:
        """The same in options; None once the tensor may have been written to."""
        return self._content.plan

    def spelled_out(self) -> Tensor:
        """The tensor itself, built once."""
        if self._content.tensor is None:
            self._content.tensor = self._content.build()
        return self._content.tensor

    def __deepcopy__(self, memo: Any) -> Tensor:
        """A plain tensor."""
        return self.spelled_out().clone()

    def share_memory_(self) -> Tensor:
        """A plain tensor in shared memory; this one has no memory that could be."""
        return self.spelled_out().clone().share_memory_()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        masks = [x for x in tree_leaves((args, kwargs)) if isinstance(x, PlannedMask)]
        if func.overloadpacket is torch.ops.aten.add:
            raise ValueError(_NOT_CALLED.format("This model adds its mask to scores"))
        if func is torch.ops.aten.detach.default:  # reentrant checkpointing does that
            return cls(masks[0]._content, masks[0].shape, masks[0].device)
        if func._schema.is_mutable or func.is_view:  # a view can be written through
            for mask in masks:
                mask._content.plan = None
        args, kwargs = tree_map(lambda x: x.spelled_out() if isinstance(x, PlannedMask) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


_NOT_CALLED = (
    "{} of its own, where a mask of booleans means something else, and does not call the attention implementation; "
    'use attn_implementation="eager" for it'
)


@dataclass
class _Content:
    plan: MaskPlan | None
    build: Callable[[], Tensor]
    tensor: Tensor | None = None


def make_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **others: Any,
) -> Tensor:
    """The mask function behind `attn_implementation="fastattn"`; the library calls it once per forward of a model.

        q_length, kv_length  sizes of the mask
        q_offset, kv_offset  positions of the first query and the first key. transformers 4 gives cache_position,
                             (q_length,), the positions of the queries, in place of q_length and q_offset
        mask_function        (batch, head, query position, key position) -> may attend
        attention_mask       (batch, positions), bool, False = padding; positions past its end are padding

    Returns a `PlannedMask`, or a bool tensor (batch, 1, q_length, kv_length) where no plan says the same. It reads a
    few numbers back from the device, here so that no layer has to. Raises TypeError for a version of transformers that
    describes its masks in another way, and ValueError for a model that computes attention itself.
    """
    _check_model(others.get("config"))
    if (q_length is None) == (cache_position is None):
        raise TypeError(
            "make_mask expects q_length and q_offset, or cache_position: this version of transformers describes its "
            f"masks in another way, with {sorted(others)}"
        )
    if cache_position is None:
        assert q_length is not None
        queries: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset}
    else:
        q_length = cache_position.shape[0]
        queries = {"cache_position": cache_position}
    pattern = None
    # generate() compiles decoding with a static cache, and asks for a mask that is there. One row is linear anyway.
    decoding = q_length == 1 and not allow_is_causal_skip
    if not (decoding or torch.compiler.is_compiling() or torch.jit.is_tracing()):  # type: ignore[attr-defined]
        pattern = read_pattern(mask_function)
    if pattern is not None and (attention_mask is None or attention_mask.ndim == 2):
        first = _first_query(q_offset if cache_position is None else cache_position)
        real = None if attention_mask is None else _real_keys(attention_mask, kv_offset, kv_length)
        plan = None if first is None else make_plan(pattern, first - kv_offset, q_length, kv_length, real)
        if plan is not None:
            assert first is not None
            given = next((x.device for x in (attention_mask, cache_position) if x is not None), None)
            device = torch.device(others.get("device", "cpu") if given is None else given)
            shape = torch.Size((batch_size, 1, q_length, kv_length))
            build = partial(_spell_out, mask_function, shape, first, kv_offset, real, device)
            return PlannedMask(_Content(plan, build), shape, device)
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **{**others, **queries, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )


_HAVE_THE_TABLE_FOR_OTHER_LAYERS = ("modeling_git", "modeling_bigbird_pegasus", "modeling_informer")
"""Modules where some layers take the table, and others add the library's mask to their own scores."""


def _check_model(config: Any) -> None:
    """Refuses models that ask for a mask, and then add it to scores of their own: True would count as 1."""
    module = sys.modules.get(type(config).__module__.replace(".configuration_", ".modeling_"))
    if module is not None and _attends_itself(module):
        raise ValueError(_NOT_CALLED.format(f"The model of {type(config).__name__} computes attention"))


def _attends_itself(module: ModuleType) -> bool:
    """Whether a module has attention layers that do not take the table of attention implementations."""
    if module.__name__.rpartition(".")[2] in _HAVE_THE_TABLE_FOR_OTHER_LAYERS:
        return True
    return not hasattr(module, "ALL_ATTENTION_FUNCTIONS") and any(
        isinstance(x, type)
        and issubclass(x, torch.nn.Module)
        and "Attention" in name
        and x.__module__ == module.__name__
        for name, x in vars(module).items()
    )


def make_plan(pattern: Pattern, offset: int, seqlen_q: int, seqlen_k: int, real: Tensor | None) -> MaskPlan | None:
    """The plan for queries of which the first stands `offset` keys past the first key; None if there is none.

    real, (batch, seqlen_k), bool: False = padding.
    """
    if pattern.left is not None and pattern.left < 0:
        return None
    if pattern.sequence_ids is not None:
        square = offset == 0 and seqlen_q == seqlen_k == pattern.sequence_ids.shape[1]
        return _packed_plan(pattern) if square and real is None else None
    if pattern.position_ids is not None:
        return None
    causal = pattern.right == 0
    if causal:  # keys past the last query are hidden, be they padding or not there yet
        if not 0 <= offset + seqlen_q <= seqlen_k:
            return None
        seqlen_k = offset + seqlen_q
        real = None if real is None else real[:, :seqlen_k]
    positional = pattern.left is not None or pattern.right is not None
    bottom_right = offset == seqlen_k - seqlen_q or not positional
    top_left = offset == 0 or not positional
    kv_lengths = key_mask = None
    if real is not None and not real.all():
        lengths = real.sum(1)
        padded_right = bool((real == (torch.arange(seqlen_k, device=real.device) < lengths[:, None])).all())
        if padded_right and top_left:  # lengths move the bottom right
            kv_lengths, bottom_right = lengths.to(torch.int32), not positional
        else:
            key_mask = real[:, None, None, :]
    if not (top_left or bottom_right):
        return None
    window = (pattern.left, None if causal else pattern.right)
    return MaskPlan(
        seqlen_k,
        causal,
        None if window == (None, None) else window,
        "bottom-right" if bottom_right else "top-left",
        kv_lengths,
        key_mask,
    )


def _packed_plan(pattern: Pattern) -> MaskPlan | None:
    """Sequences packed one behind the other in each row of the batch; they never cross rows."""
    ids = pattern.sequence_ids
    assert ids is not None
    steps = ids.diff(dim=1)
    sound = (steps >= 0).all()  # sequences in one piece
    if pattern.position_ids is not None:  # in which positions count the tokens
        sound = sound & ((pattern.position_ids.diff(dim=1) == 1) | (steps != 0)).all()
    if not sound:
        return None
    batch, seqlen = ids.shape
    causal = pattern.right == 0
    window = (pattern.left, None if causal else pattern.right)
    options = (seqlen, causal, None if window == (None, None) else window)
    if not steps.any():
        return MaskPlan(*options)
    starts = torch.nn.functional.pad(steps != 0, (1, 0), value=True).flatten().nonzero()[:, 0]
    return MaskPlan(*options, cu_seqlens=torch.nn.functional.pad(starts, (0, 1), value=batch * seqlen).to(torch.int32))


def _spell_out(
    mask_function: Callable[..., Any],
    shape: torch.Size,
    q_offset: int,
    kv_offset: int,
    real: Tensor | None,
    device: torch.device,
) -> Tensor:
    """The mask, of this shape, of a function that is made of known parts: they compute on index tensors."""
    batch, head, queries, keys = (torch.arange(size, device=device) for size in shape)
    seen = mask_function(batch[:, None, None, None], head, queries[:, None] + q_offset, keys + kv_offset)
    if real is not None:
        seen = seen & real[:, None, None, :]
    return seen.expand(shape).contiguous()


def _first_query(positions: int | Tensor) -> int | None:
    """Position of the first query, of which the others are the successors; None where they are not."""
    if not isinstance(positions, Tensor):
        return positions
    found = positions.reshape(-1).tolist()
    first = found[0] if found else 0
    return first if found == list(range(first, first + len(found))) else None


def _real_keys(attention_mask: Tensor, kv_offset: int, kv_length: int) -> Tensor:
    """The part of the padding mask, (batch, kv_length), that is about the keys; what it does not say is padding."""
    missing = kv_offset + kv_length - attention_mask.shape[1]
    padded = attention_mask.bool()
    if missing > 0:
        padded = torch.nn.functional.pad(padded, (0, missing), value=False)
    return padded[:, kv_offset : kv_offset + kv_length]
