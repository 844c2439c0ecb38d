"""Masks of Hugging Face Transformers as `fastattn.attention` is told them: lengths, windows and causality.

A model of that library says what a query may see by a function of positions and a two-dimensional padding mask, and
has its attention implementation turn both into something. Here they become a `MaskPlan`, linear in the sequence,
wherever the function is made of parts that are known; any other is spelled out by the library, as a boolean tensor.
Both are handed to the model as a `PlannedMask`, which has the meaning of eager attention's if computed with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import masking_utils

from .classes import WITHOUT_SDPA, check_config
from .patterns import Pattern, read_pattern


@dataclass(frozen=True)
class MaskPlan:
    """What `fastattn.attention` is told instead of a mask.

    Fields of the same names are its arguments, except

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
    """A mask (batch, 1, seqlen_q, seqlen_k) that takes no memory until something computes with it.

    Models hand it from layer to layer like a tensor, and the attention function reads its plan. A model that computes
    with it gets what its eager attention would: numbers of the model's dtype that are added to scores, 0 = attend, the
    lowest = hidden. Operations that do not belong to that meaning, such as `bool`, raise ValueError.
    """

    _content: _Content

    @staticmethod
    def __new__(cls, content: _Content, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> PlannedMask:
        """A tensor of this shape; `content` is shared with those detached from it."""
        added = content.added  # torch asks for strides before it decides between a view and a copy
        strides = None if added is None else added.stride()
        self = torch.Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=device)
        self._content = content
        return self

    @property
    def plan(self) -> MaskPlan | None:
        """The same in options; None where there are none, and once the tensor may have been written to."""
        return self._content.plan

    def seen(self) -> Tensor:
        """The mask for `fastattn.attention`: booleans, True = attend, or what is added to scores if it was changed."""
        return self.added() if self._content.seen is None else self._content.seen()

    def added(self) -> Tensor:
        """The tensor itself, built once: 0 = attend, the lowest number of the dtype = hidden."""
        content = self._content
        if content.added is None and content.seen is not None:
            zero = torch.zeros((), dtype=self.dtype, device=self.device)
            content.added = torch.where(content.seen(), zero, torch.finfo(self.dtype).min).contiguous()
        assert content.added is not None
        return content.added

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PlannedMask(shape={tuple(self.shape)}, dtype={self.dtype}, plan={self.plan})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        """A plain tensor."""
        return self.added().clone()

    def share_memory_(self) -> Tensor:
        """A plain tensor in shared memory; this one has no memory that could be."""
        return self.added().clone().share_memory_()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Sees booleans that torch turns into numbers before `__torch_dispatch__`."""
        kwargs = kwargs or {}
        if func in (torch.nn.functional.pad, torch.where, Tensor.__setitem__) and any(
            isinstance(x, bool) for x in (*args[1:], *kwargs.values())
        ):
            raise ValueError(_NOT_KNOWN.format(f"{func.__name__.strip('_')} with booleans"))
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        masks = [x for x in tree_leaves((args, kwargs)) if isinstance(x, PlannedMask)]
        if func is torch.ops.aten.detach.default:  # reentrant checkpointing does that
            return masks[0]._like(masks[0]._content)
        dtype = kwargs.get("dtype")
        if func.overloadpacket.__name__ not in KEEP_THE_MEANING or not (dtype is None or dtype.is_floating_point):
            to = "" if dtype is None else f" to {dtype}"
            raise ValueError(_NOT_KNOWN.format(func.overloadpacket.__name__ + to))
        if func.overloadpacket.__name__ in ("clone", "_to_copy") and kwargs.get("device") in (None, masks[0].device):
            content, dtype = masks[0]._content, dtype or masks[0].dtype
            if content.seen is not None:
                return masks[0]._like(_Content(content.plan, content.seen), dtype)
        written = args[0] if func._schema.is_mutable else None
        if written is not None and not written.is_floating_point():
            raise ValueError(_NOT_KNOWN.format(f"{func.overloadpacket.__name__} to {written.dtype}"))
        if _has_boolean_numbers(func, args, kwargs):
            raise ValueError(_NOT_KNOWN.format(f"{func.overloadpacket.__name__} with booleans"))
        if func.is_view or isinstance(written, PlannedMask):  # a view can be written through
            content = (masks[0] if written is None else written)._content
            masks[0].added()
            content.plan = content.seen = None
        args, kwargs = tree_map(lambda x: x.added() if isinstance(x, PlannedMask) else x, (args, kwargs))
        result = func(*args, **kwargs)
        if written is not None:
            return written
        # A part of the mask is not to be mistaken for booleans either.
        return tree_map(lambda x: masks[0]._like(_Content(None, None, x)), result) if func.is_view else result

    def _like(self, content: _Content, dtype: torch.dtype | None = None) -> PlannedMask:
        shape = self.shape if content.added is None else content.added.shape
        return PlannedMask(content, shape, dtype or self.dtype, self.device)


@dataclass
class _Content:
    plan: MaskPlan | None
    seen: Callable[[], Tensor] | None
    """Gives the booleans; None where only the numbers are true."""
    added: Tensor | None = None


KEEP_THE_MEANING = frozenset(
    (
        # Parts of the mask, in other shapes and places.
        *("slice", "select", "narrow", "split", "split_with_sizes", "unbind", "view", "_unsafe_view", "alias"),
        *("expand", "squeeze", "unsqueeze", "permute", "transpose", "_reshape_alias", "clone", "_to_copy", "repeat"),
        *("index", "index_select", "gather", "flip", "copy_", "slice_scatter", "select_scatter", "empty_like"),
        # More keys and queries beside it; zeros, which padding adds, mean "attend" as in eager attention.
        *("cat", "stack", "constant_pad_nd"),
        # Sums with scores and biases, and numbers put in; "minimum" hides what either hides.
        *("add", "add_", "minimum", "maximum", "where", "masked_fill", "masked_fill_", "fill_", "index_put_"),
        *("zero_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty"),
        # Questions about its numbers.
        *("eq", "ne", "lt", "le", "gt", "ge", "isinf", "is_same_size"),
    )
)
"""Operations of aten that give the same of numbers that are added to scores, whoever made them."""

_NUMBERS = frozenset(("self", "other", "value", "values", "tensors", "src", "source", "fill_value"))
"""Arguments of these operations that belong beside the mask's numbers; `mask`, `condition` and indices do not."""

_NOT_KNOWN = (
    'This model applies "{}" to the attention mask of attn_implementation="fastattn", numbers that are added to '
    "scores (0 = attend, the lowest = hidden): not known to keep that meaning; "
    'use attn_implementation="eager" for it'
)


def _has_boolean_numbers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether booleans, as tensors or in Python, stand where the mask has numbers: True is "attend" in them, 0 here."""
    names = (argument.name for argument in func._schema.arguments)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return any(
        isinstance(x, bool) or (isinstance(x, Tensor) and x.dtype == torch.bool)
        for name, value in given.items()
        if name in _NUMBERS
        for x in tree_leaves(value)
    )


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

    Returns a `PlannedMask`. Where transformers compiles what it goes to, which takes plain tensors only, the mask is
    spelled out as the model would get it otherwise: booleans as for sdpa, or numbers as for eager attention if its
    classes have `_supports_sdpa = False`. It reads a few numbers back from the device, here so that no layer has to.
    Raises TypeError for a version of transformers that describes its masks in another way, and ValueError for a model
    that computes attention itself.
    """
    config = others.get("config")
    compiled = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if config is not None and not compiled:
        check_config(config)
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
    call = {
        **{"batch_size": batch_size, "kv_length": kv_length, "kv_offset": kv_offset, "mask_function": mask_function},
        **{**others, **queries, "attention_mask": attention_mask, "allow_is_causal_skip": False},
    }
    # generate() compiles decoding with a static cache, and asks for a mask that is there. One row is linear anyway.
    decoding = q_length == 1 and not allow_is_causal_skip
    if decoding or compiled:
        library: Any = masking_utils.eager_mask if type(config) in WITHOUT_SDPA else masking_utils.sdpa_mask
        skipped = attention_mask is None and not decoding and others.get("allow_is_bidirectional_skip", False)
        return library(**{**call, "allow_is_bidirectional_skip": skipped})
    plan = None
    pattern = read_pattern(mask_function)
    if pattern is not None and (attention_mask is None or attention_mask.ndim == 2):
        first = _first_query(q_offset if cache_position is None else cache_position)
        real = None if attention_mask is None else _real_keys(attention_mask, kv_offset, kv_length)
        plan = None if first is None else make_plan(pattern, first - kv_offset, q_length, kv_length, real)
    shape = torch.Size((batch_size, 1, q_length, kv_length))
    if plan is None:
        tensor = masking_utils.sdpa_mask(**{**call, "allow_is_bidirectional_skip": False})
        content, device = _Content(None, lambda: tensor), tensor.device
    else:
        assert first is not None
        given = next((x.device for x in (attention_mask, cache_position) if x is not None), None)
        device = torch.device(others.get("device", "cpu") if given is None else given)
        build = partial(_spell_out, mask_function, shape, first, kv_offset, real, device)
        content = _Content(plan, cache(build))
    return PlannedMask(content, shape, others.get("dtype", torch.float32), device)


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
