"""What the Triton backend launches for a call: grids, workspaces, and the arguments of kernels/arguments.py."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...kernels import append as append_kernels
from ...kernels import arguments as args
from ...kernels import backward as backward_kernels
from ...kernels import bias_gradient as bias_kernels
from ...kernels import config
from ...kernels import forward as forward_kernels
from ...kernels.launch import Launch
from ...kernels.machine import Machine
from ...problem import Inputs, Problem
from ..base import Grads, Needs, Results, empty_grad


def forward_launches(problem: Problem, inputs: Inputs, machine: Machine, results: Results) -> list[Launch]:
    """The kernels of a forward pass over inputs from `in_memory`; `results` are what they write."""
    p = problem
    packed = p.kind != "varlen" and p.group > 1 and p.seqlen_q * p.group <= config.PACKED_ROWS
    shape = shape_of(p, packed=packed)

    def build(chosen: config.Config) -> list[Launch]:
        return _forward(p, inputs, machine.architecture(p.device), shape, chosen, results)

    return build(machine.choose(p.device, "forward", shape, build))


def _forward(
    p: Problem,
    x: Inputs,
    device: config.Architecture,
    shape: config.Shape,
    chosen: config.Config,
    results: Results,
) -> list[Launch]:
    out, lse, _ = results
    splits = 1 if p.kind == "varlen" else config.choose_splits(shape, chosen, device)
    grid = _tiles(p, shape.rows, chosen.block_m) * (p.heads_kv if shape.packed else p.heads_q) * splits
    values = {
        **_common(p, x),
        **_maps(p, x, shape, chosen, device),
        "out": _array(p, out),
        "lse": lse,
        **_residuals(p, results),
        "sinks": x.sinks,
        "paging": _paging(p, x),
        "rotation": _rotation(x),
        **dict.fromkeys(("splits", "stride_out", "stride_lse")),
        "VARIANT": _variant(p, x, shape, chosen, device),
    }
    if splits == 1:
        return [Launch(forward_kernels.forward, grid, values, chosen.num_warps, chosen.num_stages)]
    partial_out = torch.empty((splits, *out.shape), dtype=torch.float32, device=p.device)
    partial_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=p.device)
    partial_residual = None if values["lse_residual"] is None else torch.empty_like(partial_lse)
    parts = {"splits": splits, "stride_out": partial_out.stride(0), "stride_lse": partial_lse.stride(0)}
    partial = {
        "out": _array(p, partial_out[0]),
        "lse": partial_lse,
        "out_residual": None,
        "lse_residual": partial_residual,
        **parts,
    }
    rows, block = lse.numel(), 16
    merged = {
        "partial_out": partial_out,
        "partial_lse": partial_lse,
        "partial_residual": partial_residual,
        **{name: values[name] for name in ("out", "lse", "out_residual", "lse_residual")},
        "sinks": x.sinks,
        "rows": rows,
        **parts,
        "heads_q": p.heads_q,
        "seqlen_q": p.seqlen_q,
        "BLOCK_M": block,
        "BLOCK_D": config.padded(p.head_dim_v),
        "DIM": p.head_dim_v,
    }
    return [
        Launch(forward_kernels.forward, grid, {**values, **partial}, chosen.num_warps, chosen.num_stages),
        Launch(forward_kernels.combine, -(-rows // block), merged),
    ]


def _residuals(p: Problem, results: Results) -> dict[str, Any]:
    """The residual of out or of lse, see `Results`."""
    residual = results.residual
    if residual is None:
        return {"out_residual": None, "lse_residual": None}
    if p.dtype == torch.float32:
        return {"out_residual": None, "lse_residual": residual.contiguous()}
    return {"out_residual": _array(p, residual), "lse_residual": None}


def _maps(
    p: Problem, x: Inputs, shape: config.Shape, chosen: config.Config, device: config.Architecture
) -> dict[str, TensorDescriptor | None]:
    """Tensor descriptors of k and v, where they pay and can be: rows and heads must lie at multiples of 16 bytes.

    Permuted keys are gathered row by row, which they cannot do.
    """
    plain = p.kind == "dense" and not shape.permuted
    if not (plain and config.maps(shape, device) and all(_mappable(y) for y in (x.k, x.v))):
        return {"k_map": None, "v_map": None}
    widths = {"k_map": (x.k, config.padded(p.head_dim)), "v_map": (x.v, config.part(p.head_dim_v))}
    return {
        name: TensorDescriptor(y, list(y.shape), list(y.stride()), [1, 1, chosen.block_n, width])
        for name, (y, width) in widths.items()
    }


def _mappable(x: Tensor) -> bool:
    steps = [step * x.element_size() for step in x.stride()[:-1]]
    aligned = x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return aligned and x.stride(-1) == 1 and x.numel() > 0


def append_launch(problem: Problem, inputs: Inputs, machine: Machine) -> Launch:
    """The kernel that writes the new keys and values into the cache."""
    p, x, device = problem, inputs, machine.architecture(problem.device)
    assert x.k_new is not None
    assert x.v_new is not None
    shape = shape_of(p, packed=False)
    chosen = config.choose_append(shape, device)
    common = _common(p, x)
    values = {
        "k_new": _array(p, x.k_new),
        "v_new": _array(p, x.v_new),
        **{name: common[name] for name in ("k", "v", "heads", "kv_lengths", "batch", "seqlen_k", "seqlen_new")},
        "paging": _paging(p, x),
        "rotation": _rotation(x),
        "VARIANT": _variant(p, x, shape, chosen, device),
    }
    grid = -(-p.seqlen_new // chosen.block_n) * p.batch * p.heads_kv
    return Launch(append_kernels.append, grid, values, chosen.num_warps, chosen.num_stages)


class Gradients:
    """One backward pass: the launches that fill its results."""

    def __init__(
        self,
        problem: Problem,
        inputs: Inputs,
        machine: Machine,
        results: Results,
        dout: Tensor,
        dlse: Tensor | None,
        needs: Needs,
    ) -> None:
        p, x = problem, inputs
        self.problem, self.inputs, self.machine, self.needs = p, x, machine, needs
        self.shape = shape_of(p, packed=False)
        self.float32 = p.dtype == torch.float32  # see backward.statistics
        residual = None if results.residual is None else _plain(results.residual)
        self.stored = Results(_plain(results.out), _plain(results.lse), residual)
        self.lse, self.dout = self.stored.lse.contiguous(), _plain(dout)
        self.delta = torch.empty(self.lse.shape, dtype=torch.float32, device=p.device)
        self.row_lse = self.delta.new_empty((2 if self.float32 else 1, *self.lse.shape))
        self.values = {
            **_common(p, x),
            "dout": _array(p, self.dout),
            "row_lse": self.row_lse,
            "delta": self.delta,
        }
        self.dlse = None if dlse is None else _plain(dlse).contiguous()
        self.launches = [self._statistics()]
        self.dq = self.dk = self.dv = self.dbias = None
        if needs.q:
            self.dq = empty_grad(x.q)
            self.launches.append(self._of_queries(self.dq))
        if needs.k or needs.v:
            self.dk, self.dv = empty_grad(x.k), empty_grad(x.v)
            self.launches.append(self._of_keys(self.dk, self.dv))
        if needs.bias and x.bias is not None:
            launch, self.dbias = self._of_bias(x.bias)
            self.launches.append(launch)

    def results(self) -> Grads:
        """The gradients, after the launches ran."""
        x, needs = self.inputs, self.needs
        return Grads(
            self.dq,
            self.dk if needs.k else None,
            self.dv if needs.v else None,
            None if self.dbias is None or x.bias is None else self._summed(self.dbias, x.bias),
            self._of_sinks(x.sinks) if needs.sinks and x.sinks is not None else None,
        )

    def _statistics(self) -> Launch:
        p, block = self.problem, 16
        rows = self.lse.numel()
        values = {
            "out": _array(p, self.stored.out),
            **_residuals(p, self.stored),
            "dout": self.values["dout"],
            "lse": self.lse,
            "dlse": self.dlse,
            "row_lse": self.row_lse,
            "delta": self.delta,
            "rows": rows,
            "heads_q": p.heads_q,
            "seqlen_q": p.seqlen_q,
            "scale": _single(p.scale),
            "BLOCK_M": block,
            "BLOCK_D": config.padded(p.head_dim_v),
            "DIM": p.head_dim_v,
            "PLAIN": _is_plain(p, self.inputs),
            "FLOAT32": self.float32,
        }
        return Launch(backward_kernels.statistics, -(-rows // block), values)

    def _launch(self, kernel: Any, grid: Callable[[config.Config], int], values: dict[str, Any]) -> Launch:
        """A launch over `grid` programs, in the configuration that the machine chooses."""
        p = self.problem

        def build(chosen: config.Config) -> list[Launch]:
            variant = _variant(p, self.inputs, self.shape, chosen, self.machine.architecture(p.device), self.dout)
            arguments = {**self.values, **values, "VARIANT": variant}
            return [Launch(kernel, grid(chosen), arguments, chosen.num_warps, chosen.num_stages)]

        return build(self.machine.choose(p.device, kernel.__name__, self.shape, build))[0]

    def _of_queries(self, dq: Tensor) -> Launch:
        p = self.problem

        def grid(chosen: config.Config) -> int:
            return _tiles(p, p.seqlen_q, chosen.block_m) * p.heads_q

        return self._launch(backward_kernels.gradient_of_queries, grid, {"dq": _array(p, dq)})

    def _of_keys(self, dk: Tensor, dv: Tensor) -> Launch:
        p = self.problem

        def grid(chosen: config.Config) -> int:
            return _tiles(p, p.seqlen_k, chosen.block_n) * p.heads_kv

        return self._launch(backward_kernels.gradient_of_keys, grid, {"dk": _array(p, dk), "dv": _array(p, dv)})

    def _of_bias(self, bias: Tensor) -> tuple[Launch, Tensor]:
        """The launch, and the tensor of partial sums that it fills; `_summed` adds them up.

        A bias with a row for each query and a column for each key is summed over the rest by the kernel, as partial
        sums would outgrow it. Any other is much smaller than the scores, and gets a partial sum per sequence and head.
        """
        p = self.problem
        chosen = config.choose("gradient_of_bias", self.shape, self.machine.architecture(p.device))
        batches, heads, rows, columns = (1,) * (4 - bias.ndim) + tuple(bias.shape)
        if rows == 1 or columns == 1:
            batches, heads = p.batch, p.heads_q
        tiles_m = -(-rows // chosen.block_m) if rows > 1 else 1
        if rows == columns == 1:
            tiles_m = -(-p.seqlen_q // chosen.block_m)
        tiles_n = -(-columns // chosen.block_n) if columns > 1 else 1
        height = tiles_m * chosen.block_m if rows > 1 else tiles_m
        width = tiles_n * chosen.block_n if columns > 1 else 1
        partial = torch.zeros((batches, heads, height, width), dtype=torch.float32, device=p.device)
        values = {
            **self.values,
            "dbias": args.Array(partial, *partial.stride()),
            "batches": batches,
            "heads_out": heads,
            "tiles_m": tiles_m,
            "tiles_n": tiles_n,
            "ALL_BATCHES": batches == 1 and p.batch > 1,
            "ALL_HEADS": heads == 1 and p.heads_q > 1,
            "ALL_ROWS": rows == 1 and columns > 1,
            "SUM_ROWS": rows == 1,
            "SUM_COLUMNS": columns == 1,
            "VARIANT": _variant(p, self.inputs, self.shape, chosen, self.machine.architecture(p.device), self.dout),
        }
        empty = 0 in (p.batch, p.heads_q, p.seqlen_q, p.seqlen_k)
        grid = 0 if empty else batches * heads * tiles_m * tiles_n
        return Launch(bias_kernels.gradient_of_bias, grid, values, chosen.num_warps, chosen.num_stages), partial

    @staticmethod
    def _summed(partial: Tensor, bias: Tensor) -> Tensor:
        """The partial sums over what the bias broadcasts, in its shape and dtype."""
        shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
        over = [d for d, size in enumerate(shape) if size == 1 and partial.shape[d] != 1]
        total = partial.sum(over, keepdim=True) if over else partial
        return total[tuple(slice(size) for size in shape)].to(bias.dtype).reshape(bias.shape)

    def _of_sinks(self, sinks: Tensor) -> Tensor:
        """A sink takes its share of each row, and gives nothing: its gradient is the sum of -share * delta.

        A row that saw nothing else is all sink, and its delta, which no kernel may see, is -dlse.
        """
        exponent, delta = sinks.float().view(-1, 1) - self.lse, self.delta
        nothing = self.row_lse[0] == torch.inf
        if self.float32 and self.stored.residual is not None:
            exponent = exponent - self.stored.residual.masked_fill(nothing, 0.0)
        share = torch.exp(exponent).masked_fill(self.lse == -torch.inf, 0.0)
        if self.dlse is not None:
            delta = torch.where(nothing & (self.lse != -torch.inf), -self.dlse.float(), delta)
        total = -(share * delta).sum(-1)
        return (total if self.problem.kind == "varlen" else total.sum(0)).to(sinks.dtype)


def _tiles(p: Problem, rows: int, block: int) -> int:
    """Tiles of all sequences; how varlen sequences share theirs is in kernels/sequences.py."""
    return rows // block + p.batch + 1 if p.kind == "varlen" else -(-rows // block) * p.batch


def shape_of(p: Problem, *, packed: bool) -> config.Shape:
    """What configurations depend on of a call; packed: the heads of a group share tiles."""
    return config.Shape(
        element_size=p.dtype.itemsize,
        head_dim=p.head_dim,
        head_dim_v=p.head_dim_v,
        rows=p.seqlen_q * p.group if packed else p.seqlen_q,
        keys=p.seqlen_k,
        programs=p.batch * (p.heads_kv if packed else p.heads_q),
        loads_scores=bool({"mask", "bias"} & p.features),
        masks="mask" in p.features,
        drops="dropout" in p.features,
        packed=packed,
        call=f"{p.kind}: {', '.join(sorted(p.features))}",
    )


def _variant(
    p: Problem, x: Inputs, shape: config.Shape, chosen: config.Config, device: config.Architecture, *more: Tensor
) -> args.Variant:
    """What is compiled in; `more` are tensors whose rows a kernel loads beside those of q, k and v."""
    part = config.part(p.head_dim_v)
    return args.Variant(
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_D=config.padded(p.head_dim),
        PART=part,
        PARTS=config.padded(p.head_dim_v) // part,
        HEAD_DIM=p.head_dim,
        HEAD_DIM_V=p.head_dim_v,
        FLOAT32=p.dtype == torch.float32,
        PRECISION=config.precision(device),
        PLAIN=_is_plain(p, x),
        # An error of the tanh is multiplied by the softcap; half precision forgives more.
        RELATIVE=p.softcap is not None and (p.dtype == torch.float32 or p.softcap > 100),
        PERMUTED=shape.permuted,
        PASS=config.rows_at_once(chosen, shape, device),
        LAZY=config.lazy(device),
        SUMS=config.sums(shape),
        WIDE=_wide(chosen, x.q, x.k, x.v, *more),
        PACKED=shape.packed,
        PAGED=p.page_size > 0,
        ROTARY_DIM=p.rotary_dim,
        INTERLEAVED=p.rotary_interleaved,
    )


def _is_plain(p: Problem, x: Inputs) -> bool:
    """Whether scores are products times a positive scale, by which lse may be divided."""
    return p.scale > 1e-18 and p.softcap is None and x.bias is None and x.alibi_slopes is None


def _single(x: float) -> float:
    """The float32 number that kernels are handed: they and the interpreter, which keeps more digits, agree then."""
    return struct.unpack("f", struct.pack("f", x))[0]


def _wide(chosen: config.Config, *tensors: Tensor) -> bool:
    """True if a block of rows of one of them spans more than 32 bits can count."""
    rows = max(chosen.block_m, chosen.block_n)
    return any(x.stride(0 if x.ndim == 3 else 2) * rows + x.stride(-1) * x.shape[-1] >= 2**31 for x in tensors)


def _common(p: Problem, x: Inputs) -> dict[str, Any]:
    """The arguments that all kernels over queries and keys take; x as `in_memory` leaves them."""
    return {
        "q": _array(p, x.q),
        "k": _array(p, x.k),
        "v": _array(p, x.v),
        "heads": args.Heads(p.heads_q, p.heads_kv, p.group),
        "cu_seqlens_q": x.cu_seqlens_q,
        "cu_seqlens_k": x.cu_seqlens_k,
        "kv_lengths": x.kv_lengths,
        "batch": p.batch,
        "seqlen_q": p.seqlen_q,
        "seqlen_k": p.seqlen_k,
        "seqlen_new": p.seqlen_new,
        "window": args.Window(
            None if p.window_left is None else min(p.window_left, args.OPEN),
            args.OPEN if p.window_right is None else min(p.window_right, args.OPEN),
            int(p.bottom_right),
        ),
        "scale": _single(p.scale),
        "softcap": p.softcap,
        "slopes": _slopes(p, x.alibi_slopes),
        "bias": _broadcast(x.bias),
        "mask": _broadcast(x.mask),
        **_dropout(p, x.seed),
    }


def _dropout(p: Problem, seed: Tensor | None) -> dict[str, float | None]:
    names = ("seed_low", "seed_high", "threshold", "dropout_scale")
    if not p.dropout_p or seed is None:
        return dict.fromkeys(names)
    number = int(seed)
    words = (number & 0xFFFFFFFF, number >> 32, p.dropout_threshold)
    return dict(zip(names, (*map(_signed, words), 1.0 / (1.0 - p.dropout_p)), strict=True))


def _signed(word: int) -> int:
    """The signed 32-bit number of the same bits: all seeds have one type then, and need one kernel."""
    return word - 2**32 if word >= 2**31 else word


def in_memory(inputs: Inputs) -> Inputs:
    """The inputs with their values where their addresses say, index tensors contiguous, masks as bytes."""
    given = {name: x if x is None or name == "seed" else _plain(x) for name, x in inputs._asdict().items()}
    for name in ("kv_lengths", "cu_seqlens_q", "cu_seqlens_k", "block_table", "sinks"):
        if given[name] is not None:
            given[name] = given[name].contiguous()
    for name in ("cos", "sin"):
        if given[name] is not None:
            given[name] = given[name].to(torch.float32).contiguous()
    if given["mask"] is not None:
        given["mask"] = given["mask"].view(torch.uint8)
    return Inputs(**given)


def _plain(x: Tensor) -> Tensor:
    """Not negated on reading, not zero without memory."""
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if x._is_zerotensor() else x.resolve_neg()


def _array(p: Problem, x: Tensor) -> args.Array:
    """q, k, v, out or a gradient of theirs."""
    if p.kind == "varlen":
        row, head, column = x.stride()
        return args.Array(x, 0, head, row, column)
    return args.Array(x, *x.stride())


def _broadcast(x: Tensor | None) -> args.Array | None:
    """A mask or bias, with stride 0 where it has one element for all."""
    if x is None:
        return None
    strides = [0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
    return args.Array(x, *[0] * (4 - x.ndim), *strides)


def _paging(p: Problem, x: Inputs) -> args.Paging | None:
    table = x.block_table
    return None if table is None else args.Paging(table, table.shape[1], p.page_size, x.k.shape[0])


def _rotation(x: Inputs) -> args.Rotation | None:
    return None if x.cos is None else args.Rotation(x.cos, x.sin, x.cos.shape[0])


def _slopes(p: Problem, x: Tensor | None) -> args.Array | None:
    if x is None:
        return None
    x = x.expand(p.batch, p.heads_q)
    return args.Array(x, *x.stride(), 0, 0)
