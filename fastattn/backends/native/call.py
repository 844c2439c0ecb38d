"""Calls as the native modules take them: tensors by name, and a description made once per kind of call.

The modules know no torch. They are handed sizes and strides once (their class `Call`), and addresses each time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...problem import DIFFERENTIABLE, INDICES, Inputs, Problem
from ..base import Grads, Needs, Results, empty_grad, in_memory

# The values of fastattn::DType in csrc/call/params.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

Tensors = dict[str, Tensor]
"""The tensors of a call by the names under which the native modules know them (kTensors in csrc/call/description.h)."""


def native_inputs(problem: Problem, inputs: Inputs) -> Tensors:
    """The inputs in the form that the native module takes them."""
    given = {name: in_memory(x) for name, x in inputs._asdict().items() if x is not None and name != "seed"}
    for name in ("mask", "bias"):
        if name in given:
            given[name] = _broadcast(problem, given[name])
    if "mask" in given:
        given["mask"] = given["mask"].view(torch.uint8)
    for name in ("alibi_slopes", "sinks", "cos", "sin"):
        if name in given:
            given[name] = given[name].to(problem.accumulator)
    if "alibi_slopes" in given:
        given["alibi_slopes"] = given["alibi_slopes"].expand(problem.batch, -1)
    for name in _CONTIGUOUS:
        if name in given:
            given[name] = given[name].contiguous()
    return given


def by_name(results: Results) -> Tensors:
    """The results, without those that are None."""
    return {name: x for name, x in results._asdict().items() if x is not None}


def _broadcast(problem: Problem, x: Tensor) -> Tensor:
    """A view (batch, heads_q, seqlen_q, seqlen_k) of a mask or bias; varlen leaves the last two as they are."""
    x = x[(None,) * (4 - x.ndim)]
    rows = (-1, -1) if problem.kind == "varlen" else (problem.seqlen_q, problem.seqlen_k)
    return x.expand(problem.batch, problem.heads_q, *rows)


def empty_grads(problem: Problem, inputs: Inputs, needs: Needs) -> list[Tensor | None]:
    """Memory for the gradients: dq, dk, dv, and dbias and dsinks in the accumulator's dtype, set to zero."""
    q, k, v, bias, sinks = inputs.differentiable
    grads: list[Tensor | None] = [
        empty_grad(x) if need and x is not None else None for x, need in zip((q, k, v), needs[:3], strict=True)
    ]
    if problem.kind == "varlen" or inputs.kv_lengths is not None:  # keys that do not exist are not written
        for grad in grads[1:]:
            if grad is not None:
                grad.zero_()
    for x, need in ((bias, needs.bias), (sinks, needs.sinks)):
        wanted = need and x is not None
        grads.append(torch.zeros(x.shape, dtype=problem.accumulator, device=problem.device) if wanted else None)  # type: ignore[union-attr]
    return grads


def gradient_tensors(
    given: Tensors, results: Results, dout: Tensor, dlse: Tensor | None, grads: list[Tensor | None]
) -> Tensors:
    """The tensors of a backward pass: `given` from `native_inputs`, `grads` from `empty_grads`."""
    tensors = given | {name: in_memory(x) for name, x in by_name(results).items()} | {"dout": in_memory(dout)}
    if dlse is not None:
        tensors["dlse"] = in_memory(dlse.to(results.lse.dtype))
    return tensors | {f"d{name}": grad for name, grad in zip(DIFFERENTIABLE, grads, strict=True) if grad is not None}


def as_grads(inputs: Inputs, grads: list[Tensor | None]) -> Grads:
    """The gradients in the shapes and dtypes of their tensors."""
    return Grads(
        *[
            grad if grad is None or like is None else grad.view(like.shape).to(like.dtype)
            for grad, like in zip(grads, inputs.differentiable, strict=True)
        ]
    )


# ------------------------------------------------------------------------------------------------- native descriptions


def addresses(tensors: Tensors) -> dict[str, int]:
    """Where the tensors' values begin."""
    return {name: x.data_ptr() for name, x in tensors.items()}


def seed_of(inputs: Inputs) -> int:
    """The seed of a call's dropout."""
    return 0 if inputs.seed is None else int(inputs.seed)


def described(call: Any, problem: Problem, tensors: Tensors) -> Any:
    """The native description for these tensors, of a module's class `Call`; made once per problem and layout."""
    return _described(call, problem, tuple([(name, x.shape, x.stride(), x.dtype) for name, x in tensors.items()]))


@lru_cache(maxsize=4096)
def _described(call: Any, problem: Problem, layouts: tuple[tuple[str, Any, Any, torch.dtype], ...]) -> Any:
    p = problem
    strides = {
        name: _strides(p.kind, name, shape, stride) for name, shape, stride, _ in layouts if name not in _CONTIGUOUS
    }
    shapes = {name: shape for name, shape, _, _ in layouts}
    pages, table, tables = shapes["k"], shapes.get("block_table", (0, 0)), shapes.get("cos", (0,))
    bias_dtype = next((dtype for name, _, _, dtype in layouts if name == "bias"), torch.float32)
    dbias = shapes.get("dbias", ())
    sizes = {
        "dtype": DTYPE_CODES[p.dtype],
        "bias_dtype": DTYPE_CODES[bias_dtype],
        "batch": p.batch,
        "heads_q": p.heads_q,
        "heads_kv": p.heads_kv,
        "seqlen_q": p.seqlen_q,
        "seqlen_k": p.seqlen_k,
        "head_dim": p.head_dim,
        "head_dim_v": p.head_dim_v,
        "max_pages": table[1],
        "page_size": p.page_size,
        "num_pages": pages[0] if p.page_size else 0,
        "seqlen_new": p.seqlen_new,
        "rotary_dim": p.rotary_dim,
        "rotary_positions": tables[0],
        "rotary_interleaved": int(p.rotary_interleaved),
        "window_left": -1 if p.window_left is None else p.window_left,
        "window_right": -1 if p.window_right is None else p.window_right,
        "bottom_right": int(p.bottom_right),
        "dropout_threshold": p.dropout_threshold,
    }
    numbers = {"scale": p.scale, "softcap": p.softcap or 0.0, "dropout_scale": 1.0 / (1.0 - p.dropout_p)}
    return call(sizes, numbers, strides, (1,) * (4 - len(dbias)) + tuple(dbias))


_CONTIGUOUS = (*INDICES, "cos", "sin")


def _strides(kind: str, name: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Strides as (batch, head, position, feature), see fastattn::View."""
    if name in ("mask", "bias", "dbias"):
        s = [0 if size == 1 else step for size, step in zip(shape, stride, strict=True)]
        return (*(0,) * (4 - len(s)), *s)  # type: ignore[return-value]
    if name == "alibi_slopes":
        return stride[0], stride[1], 0, 0
    if name in ("sinks", "dsinks"):
        return 0, stride[0], 0, 0
    rank = 3 if kind == "varlen" else 4  # of q; lse has one dimension less, and so has its residual
    if name in ("lse", "dlse") or (name == "residual" and len(stride) < rank):
        return (0, stride[0], stride[1], 0) if kind == "varlen" else (stride[0], stride[1], stride[2], 0)
    if kind == "varlen":
        return 0, stride[1], stride[0], stride[2]
    return stride  # type: ignore[return-value]
