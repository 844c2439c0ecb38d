"""The calls whose kernels the compile report shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.problem import Inputs, Options, Problem, describe

Build = Callable[[torch.dtype], tuple[Problem, Inputs]]


@dataclass(frozen=True)
class Workload:
    """A call whose kernels are compiled: those of the forward pass, or of the backward pass."""

    name: str
    build: Build
    backward: bool = False
    dtype: torch.dtype | None = None  # default: bfloat16, or float16 if the GPU has no bfloat16


def _dense(head_dim: int, seqlen_q: int = 1024, heads: tuple[int, int] = (8, 8), **given: Any) -> Build:
    def build(dtype: torch.dtype) -> tuple[Problem, Inputs]:
        q = torch.zeros(1, heads[0], seqlen_q, head_dim, dtype=dtype)
        k = torch.zeros(1, heads[1], 1024 if seqlen_q > 1 else 65536, head_dim, dtype=dtype)
        return _described("dense", q, k, given)

    return build


def _cache(head_dim: int, page_size: int = 0) -> Build:
    def build(dtype: torch.dtype) -> tuple[Problem, Inputs]:
        q, new = (torch.zeros(4, heads, 1, head_dim, dtype=dtype) for heads in (32, 8))
        pages, slots = (4096 // page_size * 4, page_size) if page_size else (4, 4096)
        cache = torch.zeros(pages, 8, slots, head_dim, dtype=dtype)
        given = {"k_new": new, "v_new": new, "kv_lengths": torch.zeros(4, dtype=torch.int32)}
        if page_size:
            given["block_table"] = torch.zeros(4, 4096 // page_size, dtype=torch.int32)
        return _described("cache", q, cache, {**given, "causal": True})

    return build


def _described(kind: str, q: Tensor, k: Tensor, given: dict[str, Any]) -> tuple[Problem, Inputs]:
    options = Options(**{name: value for name, value in given.items() if name in Options._fields})
    tensors = {name: value for name, value in given.items() if name in Inputs._fields}
    inputs = Inputs(q, k, k, **tensors)
    return describe(kind, inputs, options), inputs


_SEED = torch.zeros((), dtype=torch.int64)
_SCORES = torch.zeros(1024, 1024)

SHORT = (
    Workload("head_dim 64", _dense(64, causal=True)),
    Workload("head_dim 128", _dense(128, causal=True)),
    Workload("head_dim 64", _dense(64, causal=True), backward=True),
    Workload("decode", _dense(128, seqlen_q=1, heads=(32, 8))),
    Workload("mask", _dense(64, mask=_SCORES.bool())),
)
ALL = (
    *SHORT,
    Workload("head_dim 256", _dense(256, causal=True)),
    Workload("head_dim 96", _dense(96, causal=True)),
    Workload("head_dim 128", _dense(128, causal=True), backward=True),
    Workload("head_dim 512", _dense(512, causal=True)),
    Workload("float32", _dense(64, causal=True), dtype=torch.float32),
    Workload("float32", _dense(128, causal=True), dtype=torch.float32),
    Workload("float32", _dense(64, causal=True), backward=True, dtype=torch.float32),
    Workload("head_dim 256", _dense(256, causal=True), backward=True),
    Workload("window", _dense(64, window_left=256, causal=True)),
    Workload("softcap", _dense(64, softcap=30.0)),
    Workload("alibi", _dense(64, alibi_slopes=torch.zeros(8))),
    Workload("bias", _dense(64, bias=_SCORES)),
    Workload("dropout", _dense(64, dropout_p=0.1, seed=_SEED)),
    Workload("bias and its gradient", _dense(64, bias=_SCORES), backward=True),
    Workload("dropout", _dense(64, dropout_p=0.1, seed=_SEED), backward=True),
    Workload("cache", _cache(128)),
    Workload("paged cache", _cache(128, page_size=16)),
)
