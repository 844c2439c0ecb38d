"""What the mask functions of Hugging Face Transformers say, read from what they are made of.

The library composes them from a few functions and factories in `transformers.masking_utils`. A closure is recognised
by the code object that its factory gives it, and its constants by what it encloses. Each form is first tried on a
small grid: one that does not say there what is expected of it, as it may in a later version, is not recognised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils


@dataclass(frozen=True)
class Pattern:
    """Query i sees key j iff i - left <= j <= i + right (None = open), and both are of the same sequence.

    sequence_ids, (batch, seqlen): the sequence of each token; None = there is one. position_ids, (batch, seqlen):
    left and right count in these positions; None = in indices.
    """

    left: int | None = None
    right: int | None = None
    sequence_ids: Tensor | None = None
    position_ids: Tensor | None = None

    def sees(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """What the first row of the batch sees: bool, of the shape that both indices broadcast to."""
        seen = torch.ones_like(q_idx + kv_idx, dtype=torch.bool)
        if self.sequence_ids is not None:
            seen &= self.sequence_ids[0, q_idx] == self.sequence_ids[0, kv_idx]
        if self.position_ids is not None:
            q_idx, kv_idx = self.position_ids[0, q_idx], self.position_ids[0, kv_idx]
        if self.left is not None:
            seen &= kv_idx >= q_idx - self.left
        if self.right is not None:
            seen &= kv_idx <= q_idx + self.right
        return seen


def read_pattern(function: Callable[..., Any]) -> Pattern | None:
    """What a mask function says; None if it has a part that is not known."""
    form = _FORMS.get(getattr(function, "__code__", None))
    if form is None:
        return None
    cells = function.__closure__ or ()
    return form({name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)})


Form = Callable[[dict[str, Any]], Pattern | None]
"""From what a function encloses, by name, to what it says."""


def _intersection(enclosed: dict[str, Any]) -> Pattern | None:
    whole = Pattern()
    for function in enclosed["mask_functions"]:
        part = read_pattern(function)
        if part is None:
            return None
        tensors = []
        for name in ("sequence_ids", "position_ids"):
            ours, theirs = getattr(whole, name), getattr(part, name)
            if ours is not None and theirs is not None:
                return None
            tensors.append(theirs if ours is None else ours)
        whole = Pattern(_least(whole.left, part.left), _least(whole.right, part.right), *tensors)
    return whole


def _remapped(enclosed: dict[str, Any]) -> Pattern | None:
    inner = read_pattern(enclosed["mask_function"])
    if inner is None or inner.sequence_ids is not None or inner.position_ids is not None:
        return None
    return Pattern(inner.left, inner.right, position_ids=enclosed["position_ids"])


def _least(a: int | None, b: int | None) -> int | None:
    return min((x for x in (a, b) if x is not None), default=None)


def _add_known_forms() -> None:
    library: Any = masking_utils
    causal, ids = library.causal_mask_function, torch.tensor([[0, 0, 1, 1, 1, 2, 2]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 0, 1]])
    # In this order: later ones are made of earlier ones. The names are those of 4.57 to 5.24, some missing in 4.
    examples: tuple[tuple[str, Callable[[Any], Any], Form], ...] = (
        ("causal_mask_function", lambda f: f, lambda _: Pattern(right=0)),
        ("bidirectional_mask_function", lambda f: f, lambda _: Pattern()),
        ("sliding_window_overlay", lambda f: f(3), lambda e: Pattern(left=e["sliding_window"] - 1)),
        (
            "sliding_window_bidirectional_overlay",
            lambda f: f(2),
            lambda e: Pattern(e["sliding_window"], e["sliding_window"]),
        ),
        (
            "packed_sequence_mask_function",
            lambda f: f(ids),
            lambda e: Pattern(sequence_ids=e["packed_sequence_mask"]),
        ),
        ("remap_positions_for_packed_sequence", lambda f: f(causal, positions), _remapped),
        ("and_masks", lambda f: f(causal, library.sliding_window_overlay(3)), _intersection),
    )
    index = torch.arange(ids.shape[1])
    for name, make, form in examples:
        if not hasattr(library, name):
            continue
        example = make(getattr(library, name))
        _FORMS[example.__code__] = form
        try:
            said = read_pattern(example)
            batch = head = torch.zeros((), dtype=torch.long)
            expected = example(batch, head, index[:, None], index)
            known = said is not None and bool((said.sees(index[:, None], index) == expected).all())
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):  # a later version's, by the same name
            known = False
        if not known:
            del _FORMS[example.__code__]


_FORMS: dict[CodeType | None, Form] = {}
_add_known_forms()
