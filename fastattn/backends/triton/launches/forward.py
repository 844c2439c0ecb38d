"""The launches of a forward pass: one kernel, or one over splits of the keys and one that combines them."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ....kernels import combine as combine_kernel
from ....kernels import config
from ....kernels import forward as forward_kernel
from ....kernels.launch import Launch
from ....problem import Inputs, Problem
from ...base import Results
from ..machine import Machine
from ..shape import shape_of
from .arguments import array_of, common_arguments, grid_tiles, paging_of, residual_arguments, rotation_of, variant_of


def forward_launches(problem: Problem, inputs: Inputs, machine: Machine, results: Results) -> list[Launch]:
    """The kernels of a forward pass over inputs from `kernel_inputs`; `results` are what they write."""
    p = problem
    packed = p.kind != "varlen" and p.group > 1 and p.seqlen_q * p.group <= config.MAX_PACKED_ROWS
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
    grid = grid_tiles(p, shape.rows, chosen.block_m) * (p.heads_kv if shape.packed else p.heads_q) * splits
    values = {
        **common_arguments(p, x),
        **_maps(p, x, shape, chosen, device),
        "out": array_of(p, out),
        "lse": lse,
        **residual_arguments(p, results),
        "sinks": x.sinks,
        "paging": paging_of(p, x),
        "rotation": rotation_of(x),
        **dict.fromkeys(("splits", "stride_out", "stride_lse")),
        "VARIANT": variant_of(p, x, shape, chosen, device),
    }
    if splits == 1:
        return [Launch(forward_kernel.forward, grid, values, chosen.num_warps, chosen.num_stages)]
    out_accum = torch.empty((splits, *out.shape), dtype=torch.float32, device=p.device)
    lse_accum = torch.empty((splits, *lse.shape), dtype=torch.float32, device=p.device)
    lse_accum_residual = None if values["lse_residual"] is None else torch.empty_like(lse_accum)
    split_strides = {"splits": splits, "stride_out": out_accum.stride(0), "stride_lse": lse_accum.stride(0)}
    partial = {
        "out": array_of(p, out_accum[0]),
        "lse": lse_accum,
        "out_residual": None,
        "lse_residual": lse_accum_residual,
        **split_strides,
    }
    rows, block = lse.numel(), 16
    combined = {
        "out_accum": out_accum,
        "lse_accum": lse_accum,
        "lse_accum_residual": lse_accum_residual,
        **{name: values[name] for name in ("out", "lse", "out_residual", "lse_residual")},
        "sinks": x.sinks,
        "rows": rows,
        **split_strides,
        "heads_q": p.heads_q,
        "seqlen_q": p.seqlen_q,
        "BLOCK_M": block,
        "BLOCK_D": config.padded(p.head_dim_v),
        "DIM": p.head_dim_v,
    }
    return [
        Launch(forward_kernel.forward, grid, {**values, **partial}, chosen.num_warps, chosen.num_stages),
        Launch(combine_kernel.combine, -(-rows // block), combined),
    ]


def _maps(
    p: Problem, x: Inputs, shape: config.Shape, chosen: config.Config, device: config.Architecture
) -> dict[str, TensorDescriptor | None]:
    """Tensor descriptors of k and v, where they pay and are possible.

    Rows and heads must lie at multiples of 16 bytes. Descriptors cannot gather permuted keys row by row.
    """
    plain = p.kind == "dense" and not shape.permuted
    if not (plain and config.use_tensor_maps(shape, device) and all(_mappable(y) for y in (x.k, x.v))):
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
