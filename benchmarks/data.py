"""The tensors of a case."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import Case
from .costs import keys_read


class Data(NamedTuple):
    """The tensors of one call.

    Dense: q (batch, heads_q, seqlen_q, head_dim); k and v with heads_kv and seqlen_k; dout has the shape of out.
    Varlen: q (total_q, heads_q, head_dim) and so on, with cu_seqlens (batch + 1,) int32.
    mask (bool, True = attend) and bias are (seqlen_q, seqlen_k). Only training has dout.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


def make_data(case: Case, device: torch.device, seed: int = 0) -> Data:
    """Normally distributed tensors, the same for the same case and seed on the same kind of device."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.torch_dtype)

    q = normal(*_shape(case, case.heads_q, case.lengths_q, case.seqlen_q, case.head_dim))
    k = normal(*_shape(case, case.heads_kv, case.lengths_k, case.seqlen_k, case.head_dim))
    v = normal(*_shape(case, case.heads_kv, case.lengths_k, case.seqlen_k, case.head_dim_v))
    for tensor in (q, k, v):
        tensor.requires_grad_(case.train)
    dout = normal(*q.shape[:-1], case.head_dim_v) if case.train else None
    mask = bias = None
    if case.mask == "bool":
        keep = torch.rand((case.seqlen_q, case.seqlen_k), generator=generator, device=device) < 0.5
        mask = keep | _diagonal(case).to(device)
    elif case.mask == "additive":
        bias = normal(case.seqlen_q, case.seqlen_k)
    return Data(q, k, v, dout, mask, bias, _cumulated(case.lengths_q, device), _cumulated(case.lengths_k, device))


def make_cold_data(case: Case, device: torch.device, cache_bytes: int) -> list[Data]:
    """Copies of a case's tensors, enough that none is still in a cache of that size when its turn comes again.

    All copies hold the same values, so one check of the results covers them all.
    """
    first = make_data(case, device)
    kv_bytes = keys_read(case) * case.heads_kv * (case.head_dim + case.head_dim_v) * case.torch_dtype.itemsize
    # Twice the cache size between two uses, because caches do not evict strictly by age.
    copies = 1 + max(1, -(-2 * cache_bytes // kv_bytes))
    others = [first._replace(k=_clone(first.k), v=_clone(first.v)) for _ in range(copies - 1)]
    return [first, *others]


def options(case: Case, data: Data) -> dict[str, Any]:
    """The keyword arguments that describe the case to `fastattn.attention` and its siblings."""
    return {
        "causal": case.causal,
        "window": case.window,
        "causal_alignment": case.causal_alignment,
        "mask": data.mask,
        "bias": data.bias,
    }


def split(case: Case, data: Data) -> list[Data]:
    """The call as dense calls: itself, or for varlen one call of batch 1 per sequence. All are views."""
    if not case.varlen:
        return [data]
    q, dout = split_packed(data.q, case.lengths_q), split_packed(data.dout, case.lengths_q)
    k, v = split_packed(data.k, case.lengths_k), split_packed(data.v, case.lengths_k)
    return [Data(*tensors) for tensors in zip(q, k, v, dout, strict=True)]


def split_packed(x: Tensor | None, lengths: Sequence[int] | None) -> list[Any]:
    """Views (1, heads, length, dim) of a packed (total, heads, dim). Without lengths the tensor stays whole."""
    if x is None:
        return [None] * len(lengths or (0,))
    if lengths is None:
        return [x]
    return [part.transpose(0, 1)[None] for part in x.split(list(lengths))]


def join_packed(parts: Sequence[Tensor]) -> Tensor:
    """The inverse of `split_packed` for packed tensors."""
    return torch.cat([part[0].transpose(0, 1) for part in parts])


def hidden_pairs(case: Case, seqlen_q: int, seqlen_k: int, mask: Tensor | None, device: torch.device) -> Tensor | None:
    """bool (seqlen_q, seqlen_k), True where causal rule, window or mask hide the key. None if none is hidden."""
    left, right = case.window_bounds
    offset = seqlen_k - seqlen_q if case.causal_alignment == "bottom-right" else 0
    distance = torch.arange(seqlen_q, device=device)[:, None] + offset - torch.arange(seqlen_k, device=device)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left is not None:
        hidden |= distance > left
    if right is not None:
        hidden |= distance < -right
    if mask is not None:
        hidden |= ~mask
    return hidden if bool(hidden.any()) else None


def _shape(case: Case, heads: int, lengths: tuple[int, ...] | None, seqlen: int, head_dim: int) -> tuple[int, ...]:
    if lengths is None:
        return (case.batch, heads, seqlen, head_dim)
    return (sum(lengths), heads, head_dim)


def _diagonal(case: Case) -> Tensor:
    """True at one visible key of each query, so that no row of a random mask is empty."""
    offset = case.seqlen_k - case.seqlen_q if case.causal_alignment == "bottom-right" else 0
    positions = (torch.arange(case.seqlen_q) + offset).clamp(0, case.seqlen_k - 1)
    return positions[:, None] == torch.arange(case.seqlen_k)


def _cumulated(lengths: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
    if lengths is None:
        return None
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _clone(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)
