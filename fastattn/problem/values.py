"""The values inside index tensors, the seed, and the results that a backward pass gets back."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .types import Inputs, Problem

LARGEST_OFFSET = 2**28
"""Of q_offset, either way: kernels add it to positions and sides of windows in 32 bits, and none sees that far."""
OFFSETS = "between -2**28 and 2**28"


def check_values(problem: Problem, inputs: Inputs) -> None:
    """Checks the seed, and what is inside the index tensors where reading them costs nothing: on the CPU.

    On other devices a look would stall the stream and break graph capture.
    """
    if inputs.seed is not None and not torch.compiler.is_compiling() and int(inputs.seed) < 0:
        raise ValueError(f"seed must be in [0, 2**63), got {int(inputs.seed)}")
    if problem.device.type != "cpu":
        return
    if inputs.q_offset is not None:
        _check_q_offset(problem, inputs, inputs.q_offset.tolist())
    if problem.kind == "varlen":
        _check_cu_seqlens(problem, inputs)
    elif problem.kind == "cache":
        _check_cache(problem, inputs)
    elif inputs.kv_lengths is not None:
        _check_lengths("kv_lengths", inputs.kv_lengths.tolist(), [problem.seqlen_k] * problem.batch, "seqlen_k")


def check_results(problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor, residual: Tensor | None) -> None:
    """The results of a forward pass as its backward gets them back: hooks on saved tensors may have changed them."""
    rows = (problem.heads_q, problem.seqlen_q)
    lse_shape = rows if problem.kind == "varlen" else (problem.batch, *rows)
    wanted: dict[str, tuple[Tensor | None, Any, torch.dtype]] = {
        "out": (out, (*inputs.q.shape[:-1], problem.head_dim_v), problem.dtype),
        "lse": (lse, lse_shape, problem.accumulator),
    }
    wanted["residual"] = (residual, *wanted["out" if problem.dtype != problem.accumulator else "lse"][1:])
    for name, (x, shape, dtype) in wanted.items():
        if x is None:
            continue
        if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != problem.device:
            raise ValueError(
                f"{name} of the forward pass must come back with shape {tuple(shape)}, dtype {dtype}, on "
                f"{problem.device}, got shape {tuple(x.shape)}, dtype {x.dtype}, on {x.device}: does a hook on saved "
                "tensors change it?"
            )


def _check_q_offset(problem: Problem, inputs: Inputs, offsets: list[int]) -> None:
    for b, offset in enumerate(offsets):
        if abs(offset) > LARGEST_OFFSET:
            raise ValueError(f"q_offset must be {OFFSETS}, got q_offset[{b}] = {offset}")
        if inputs.cos is not None and offset < 0:
            raise ValueError(f"q_offset must be a position of the rotary tables, at least 0, got {offset} at index {b}")


def _check_lengths(name: str, lengths: list[int], limits: list[int], spelled: str) -> None:
    for b, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
        if not 0 <= length <= limit:
            raise ValueError(f"{name} must be between 0 and {spelled} = {limit}, got {name}[{b}] = {length}")


def _check_cu_seqlens(problem: Problem, inputs: Inputs) -> None:
    longest = []
    for name, cu, total in (
        ("cu_seqlens_q", inputs.cu_seqlens_q, problem.seqlen_q),
        ("cu_seqlens_k", inputs.cu_seqlens_k, problem.seqlen_k),
    ):
        assert cu is not None
        ends = cu.tolist()
        if ends[0] != 0:
            raise ValueError(f"{name} must begin with 0, got {ends[0]}")
        lengths = [end - start for start, end in pairwise(ends)]
        for b, length in enumerate(lengths):
            if length < 0:
                raise ValueError(f"{name} must not decrease, got {ends[b]} followed by {ends[b + 1]} at index {b + 1}")
        if ends[-1] > total:
            raise ValueError(f"{name} must end within the {total} tokens given, got {ends[-1]}")
        longest.append(max(lengths, default=0))
    if inputs.kv_lengths is not None:
        _check_lengths("kv_lengths", inputs.kv_lengths.tolist(), lengths, "the sequence's keys")
    for name, tensor in (("mask", inputs.mask), ("bias", inputs.bias)):
        if tensor is not None:
            shape = (1, 1, *tensor.shape)
            if any(size not in (1, need) and size < need for size, need in zip(shape[-2:], longest, strict=True)):
                raise ValueError(
                    f"{name} must be broadcastable to (batch, heads_q, {longest[0]}, {longest[1]}), the longest "
                    f"sequences of q and k, got shape {tuple(tensor.shape)}"
                )


def _check_cache(problem: Problem, inputs: Inputs) -> None:
    assert inputs.kv_lengths is not None
    lengths = inputs.kv_lengths.tolist()
    room = problem.seqlen_k - problem.seqlen_new
    _check_lengths("cache_lengths", lengths, [room] * problem.batch, "the capacity less the new keys")
    totals = [length + problem.seqlen_new for length in lengths]
    if inputs.cos is not None and lengths:
        last = min(problem.seqlen_q, 1) if problem.bottom_right else problem.seqlen_q
        if inputs.q_offset is not None and problem.seqlen_q > 0:
            last = max(inputs.q_offset.tolist()) + problem.seqlen_q
        needed = max(*totals, last)
        if needed > inputs.cos.shape[0]:
            raise ValueError(
                f"rotary.cos must hold a row for each of {needed} positions, got {inputs.cos.shape[0]} rows"
            )
    if inputs.block_table is not None:
        pages = inputs.k.shape[0]
        for b, (row, total) in enumerate(zip(inputs.block_table.tolist(), totals, strict=True)):
            for slot, page in enumerate(row[: -(-total // problem.page_size)]):
                if not 0 <= page < pages:
                    raise ValueError(
                        f"block_table must name pages between 0 and {pages - 1}, got block_table[{b}, {slot}] = {page}"
                    )
