"""NestedTensor inputs, as torch.nn.TransformerEncoder passes them in evaluation instead of a padding mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pad_nested(name: str, x: Any) -> tuple[Tensor, Tensor]:
    """(padded, padding): (batch, longest, features) with zeros, and bool (batch, longest), True = padding."""
    if not isinstance(x, Tensor) or not x.is_nested:
        raise TypeError(f"{name} must be a NestedTensor as query is one, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a NestedTensor of layout torch.strided, got {x.layout}")
    if x.dim() != 3:
        raise ValueError(f"{name} must be nested as (batch, seqlen, features), got {x.dim()} dimensions")
    padded = torch.nested.to_padded_tensor(x, 0.0)
    lengths = torch.tensor([sequence.shape[0] for sequence in x.unbind()], device=x.device)
    return padded, torch.arange(padded.shape[1], device=x.device) >= lengths[:, None]


def nest_like(padded: Tensor, like: Tensor) -> Tensor:
    """(batch, longest, features) as a NestedTensor with the lengths of `like`."""
    pairs = zip(padded, like.unbind(), strict=True)
    return torch.nested.as_nested_tensor([row[: sequence.shape[0]] for row, sequence in pairs])


def forward_nested(attend: Any, query: Tensor, key: Any, value: Any, others: dict[str, Any]) -> Tensor:
    """attend(query, key, value, key_padding_mask) of NestedTensors (batch, seqlen, features), nested again.

    `others` are the arguments that do not go together with nested input: they must be None or False.
    """
    for name, argument in others.items():
        if argument is not None and argument is not False:
            got = True if argument is True else f"a {type(argument).__name__}"
            raise ValueError(f"{name} must be None or False with NestedTensor inputs, got {got}")
    padded_query, padding = pad_nested("query", query)
    padded_key, padded_value = padded_query, padded_query
    if key is not query:
        padded_key, padding = pad_nested("key", key)
        padded_value = padded_key
    if value is not key:
        padded_value, value_padding = pad_nested("value", value)
        if not torch.equal(padding, value_padding):
            raise ValueError("value must hold sequences of the same lengths as key, got other ones")
    return nest_like(attend(padded_query, padded_key, padded_value, padding), query)
