"""The C++ kernels for CPUs (csrc/cpu): fused forward, backward and decoding, every feature.

The native module knows no torch: it is handed sizes and strides once per kind of call (`_cpu.Call`), and addresses
each time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..problem import DIFFERENTIABLE, Inputs, Problem
from . import Grads, Needs, empty_grad, empty_lse, empty_out, layout

try:
    from .. import _cpu
except ImportError as error:  # running from a source tree that was never built
    _cpu = None  # type: ignore[assignment]
    _import_error = str(error)

# The values of fastattn::DType in csrc/params.h.
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


_MOST_LAYOUTS = 64  # of output gradients whose calls a prepared kind keeps
_LARGEST_HEAD_DIM = 2**24  # the kernels count the elements of a few rows in 32 bits

Tensors = dict[str, Tensor]
"""The tensors of a call by the names under which the native module knows them (kTensors in csrc/bindings_cpu.cpp)."""


class CpuBackend:
    """Fused kernels, compiled for several instruction sets and chosen by the processor at hand."""

    name = "cpu"

    def why_unavailable(self) -> str | None:
        """Raises ValueError if FASTATTN_CPU_ISA names an instruction set that this processor lacks."""
        if _cpu is None:
            return (
                f"the native module fastattn._cpu could not be imported ({_import_error}); build it with pip install ."
            )
        _cpu.instruction_set()
        return None

    def why_not(self, problem: Problem) -> str | None:
        """It computes every call on CPU tensors, up to a head_dim that no memory would hold rows of."""
        if problem.device.type != "cpu":
            return f"its tensors are on {problem.device}, and this backend runs on the CPU."
        for name in ("head_dim", "head_dim_v"):
            if getattr(problem, name) > _LARGEST_HEAD_DIM:
                return f"{name} is {getattr(problem, name)}, and this backend takes at most {_LARGEST_HEAD_DIM}."
        return None

    def prepare(self, problem: Problem, inputs: Inputs) -> _PreparedCalls | None:
        """See `Backend.prepare`."""
        if any(x.is_neg() or x._is_zerotensor() for x in inputs[:3]):
            return None
        return _PreparedCalls(problem, inputs)

    def forward(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        out, lse = empty_out(problem, inputs.q), empty_lse(problem)
        tensors = {**_native(problem, inputs), "out": out, "lse": lse}
        _call(problem, tensors).forward(_addresses(tensors), _seed(inputs), torch.get_num_threads())
        return out, lse

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        needs: Needs,
    ) -> Grads:
        """See `Backend.backward`."""
        grads = _empty_grads(problem, inputs, needs)
        tensors = _native(problem, inputs) | {"out": _in_memory(out), "lse": _in_memory(lse), "dout": _in_memory(dout)}
        if dlse is not None:
            tensors["dlse"] = _in_memory(dlse.to(problem.accumulator))
        for name, grad in zip(DIFFERENTIABLE, grads, strict=True):
            if grad is not None:
                tensors[f"d{name}"] = grad
        _call(problem, tensors).backward(_addresses(tensors), _seed(inputs), torch.get_num_threads())
        return Grads(
            *[
                grad if grad is None or like is None else grad.view(like.shape).to(like.dtype)
                for grad, like in zip(grads, inputs.differentiable, strict=True)
            ]
        )

    def decode(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See `Backend.decode`."""
        out, lse = empty_out(problem, inputs.q), empty_lse(problem)
        tensors = {**_native(problem, inputs), "out": out, "lse": lse}
        _call(problem, tensors).forward_with_cache(_addresses(tensors), 0, torch.get_num_threads())
        for cache, used in ((inputs.k, tensors["k"]), (inputs.v, tensors["v"])):
            if inputs.k_new is not None and used is not cache:  # a copy was written
                cache.copy_(used)
            elif inputs.k_new is not None and not cache.is_inference():
                torch.autograd.graph.increment_version(cache)
        return out, lse


Allocate = Callable[[Tensor], Tensor]


def _allocator(wanted: Tensor, like: Tensor) -> Allocate:
    """The quickest way to memory laid out as `wanted`, given a tensor laid out as `like`."""
    if torch.empty_like(like, device="meta").stride() == wanted.stride() and like.shape == wanted.shape:
        return torch.empty_like
    shape, stride, dtype = wanted.shape, wanted.stride(), wanted.dtype
    return lambda _: torch.empty_strided(shape, stride, dtype=dtype, device="cpu")


class _PreparedCalls:
    """See `Prepared`."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        out, lse = empty_out(problem, inputs.q), empty_lse(problem)
        self.layouts: tuple[object, ...] = tuple(map(layout, (inputs.q, inputs.k, inputs.v, out, lse)))
        self._problem = problem
        self._attend = _call(problem, {**_native(problem, inputs), "out": out, "lse": lse}).attend
        self._allocate_out = _allocator(out, inputs.q)
        self._lse_shape, self._lse_dtype = lse.shape, lse.dtype
        self._allocate_grads = [_allocator(empty_grad(x), x) for x in (inputs.q, inputs.k, inputs.v)]
        self._gradients: dict[Any, Callable[..., None]] = {}

    def infer(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self._allocate_out(q)
        self._attend(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0, torch.get_num_threads())
        return out

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = self._allocate_out(q), torch.empty(self._lse_shape, dtype=self._lse_dtype, device="cpu")
        addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr())
        self._attend(*addresses, torch.get_num_threads())
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        dout = _in_memory(dout)
        wanted = zip(needs, self._allocate_grads, (q, k, v), strict=True)
        grads = tuple([allocate(x) if need else None for need, allocate, x in wanted])
        key = (dout.stride(), needs)
        run = self._gradients.get(key)  # once: another thread may clear it meanwhile
        if run is None:
            if len(self._gradients) >= _MOST_LAYOUTS:
                self._gradients.clear()
            tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout}
            tensors |= {f"d{name}": grad for name, grad in zip("qkv", grads, strict=True) if grad is not None}
            made: Callable[..., None] = _call(self._problem, tensors).gradients
            self._gradients[key] = run = made
        addresses = [0 if x is None else x.data_ptr() for x in (q, k, v, out, lse, dout, *grads)]
        run(*addresses, torch.get_num_threads())
        return grads


def instruction_set() -> str | None:
    """The instruction set that the kernels use here (see FASTATTN_CPU_ISA); None without the native module."""
    return None if _cpu is None else _cpu.instruction_set()


def multiply_adds(dtype: torch.dtype, steps: int) -> int:
    """Multiply-adds and nothing else, in the words in which the kernels multiply this dtype, on all threads.

    `steps` of 12 vectors each. Returns the floating-point operations done: the ceiling that kernels are compared with.
    """
    return _cpu.multiply_adds(_DTYPE_CODES[dtype], steps, torch.get_num_threads())


def _native(problem: Problem, inputs: Inputs) -> Tensors:
    """The inputs in the form that the native module takes them."""
    given = {name: _in_memory(x) for name, x in inputs._asdict().items() if x is not None and name != "seed"}
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


def _in_memory(x: Tensor) -> Tensor:
    """The tensor with its values where its address says: not negated on reading, not zero without memory."""
    return torch.zeros(x.shape, dtype=x.dtype, device="cpu") if x._is_zerotensor() else x.resolve_neg()


def _broadcast(problem: Problem, x: Tensor) -> Tensor:
    """A view (batch, heads_q, seqlen_q, seqlen_k) of a mask or bias; varlen leaves the last two as they are."""
    x = x[(None,) * (4 - x.ndim)]
    rows = (-1, -1) if problem.kind == "varlen" else (problem.seqlen_q, problem.seqlen_k)
    return x.expand(problem.batch, problem.heads_q, *rows)


def _empty_grads(problem: Problem, inputs: Inputs, needs: Needs) -> list[Tensor | None]:
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
        grads.append(torch.zeros(x.shape, dtype=problem.accumulator, device="cpu") if wanted else None)  # type: ignore[union-attr]
    return grads


# ------------------------------------------------------------------------------------------------- native descriptions


def _addresses(tensors: Tensors) -> dict[str, int]:
    return {name: x.data_ptr() for name, x in tensors.items()}


def _seed(inputs: Inputs) -> int:
    return 0 if inputs.seed is None else int(inputs.seed)


def _call(problem: Problem, tensors: Tensors) -> _cpu.Call:
    """The native description for these tensors, made once per problem and layout."""
    return _describe(problem, tuple([(name, x.shape, x.stride(), x.dtype) for name, x in tensors.items()]))


@lru_cache(maxsize=4096)
def _describe(problem: Problem, layouts: tuple[tuple[str, Any, Any, torch.dtype], ...]) -> _cpu.Call:
    p = problem
    strides = {
        name: _strides(p.kind, name, shape, stride) for name, shape, stride, _ in layouts if name not in _CONTIGUOUS
    }
    table = next((shape for name, shape, _, _ in layouts if name == "block_table"), (0, 0))
    bias_dtype = next((dtype for name, _, _, dtype in layouts if name == "bias"), torch.float32)
    dbias = next((shape for name, shape, _, _ in layouts if name == "dbias"), ())
    sizes = {
        "dtype": _DTYPE_CODES[p.dtype],
        "bias_dtype": _DTYPE_CODES[bias_dtype],
        "batch": p.batch,
        "heads_q": p.heads_q,
        "heads_kv": p.heads_kv,
        "seqlen_q": p.seqlen_q,
        "seqlen_k": p.seqlen_k,
        "head_dim": p.head_dim,
        "head_dim_v": p.head_dim_v,
        "max_pages": table[1],
        "page_size": p.page_size,
        "seqlen_new": p.seqlen_new,
        "rotary_dim": p.rotary_dim,
        "rotary_interleaved": int(p.rotary_interleaved),
        "window_left": -1 if p.window_left is None else p.window_left,
        "window_right": -1 if p.window_right is None else p.window_right,
        "bottom_right": int(p.bottom_right),
        "dropout_threshold": p.dropout_threshold,
    }
    numbers = {"scale": p.scale, "softcap": p.softcap or 0.0, "dropout_scale": 1.0 / (1.0 - p.dropout_p)}
    return _cpu.Call(sizes, numbers, strides, (1,) * (4 - len(dbias)) + tuple(dbias))


_CONTIGUOUS = ("kv_lengths", "cu_seqlens_q", "cu_seqlens_k", "block_table", "cos", "sin")


def _strides(kind: str, name: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Strides as (batch, head, position, feature), see fastattn::View."""
    if name in ("mask", "bias", "dbias"):
        s = [0 if size == 1 else step for size, step in zip(shape, stride, strict=True)]
        return (*(0,) * (4 - len(s)), *s)  # type: ignore[return-value]
    if name == "alibi_slopes":
        return stride[0], stride[1], 0, 0
    if name in ("sinks", "dsinks"):
        return 0, stride[0], 0, 0
    if name in ("lse", "dlse"):
        return (0, stride[0], stride[1], 0) if kind == "varlen" else (stride[0], stride[1], stride[2], 0)
    if kind == "varlen":
        return 0, stride[1], stride[0], stride[2]
    return stride  # type: ignore[return-value]
