"""The arguments of kernels/arguments.py, made of a problem and its inputs."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from ....kernels import arguments as args
from ....kernels import config
from ....problem import INDICES, Inputs, Problem
from ...base import Results, in_memory


def kernel_inputs(inputs: Inputs) -> Inputs:
    """The inputs with their values where their addresses say, index tensors contiguous, masks as bytes."""
    given = {name: x if x is None or name == "seed" else in_memory(x) for name, x in inputs._asdict().items()}
    for name in (*INDICES, "sinks"):
        if given[name] is not None:
            given[name] = given[name].contiguous()
    for name in ("cos", "sin"):
        if given[name] is not None:
            given[name] = given[name].to(torch.float32).contiguous()
    if given["mask"] is not None:
        given["mask"] = given["mask"].view(torch.uint8)
    return Inputs(**given)


def common_arguments(p: Problem, x: Inputs) -> dict[str, Any]:
    """The arguments that all kernels over queries and keys take; x from `kernel_inputs`."""
    return {
        "q": array_of(p, x.q),
        "k": array_of(p, x.k),
        "v": array_of(p, x.v),
        "heads": args.Heads(p.heads_q, p.heads_kv, p.group),
        "cu_seqlens_q": x.cu_seqlens_q,
        "cu_seqlens_k": x.cu_seqlens_k,
        "kv_lengths": x.kv_lengths,
        "q_offset": x.q_offset,
        "batch": p.batch,
        "seqlen_q": p.seqlen_q,
        "seqlen_k": p.seqlen_k,
        "seqlen_new": p.seqlen_new,
        "window": args.Window(
            None if p.window_left is None else min(p.window_left, args.OPEN),
            args.OPEN if p.window_right is None else min(p.window_right, args.OPEN),
            int(p.bottom_right),
        ),
        "scale": as_float32(p.scale),
        "softcap": p.softcap,
        "slopes": slopes_array(p, x.alibi_slopes),
        "bias": broadcast_array(x.bias),
        "mask": broadcast_array(x.mask),
        **_dropout(p, x.seed),
    }


def residual_arguments(p: Problem, results: Results) -> dict[str, Any]:
    """The residual of out or of lse, see `Results`."""
    residual = results.residual
    if residual is None:
        return {"out_residual": None, "lse_residual": None}
    if p.dtype == torch.float32:
        return {"out_residual": None, "lse_residual": residual.contiguous()}
    return {"out_residual": array_of(p, residual), "lse_residual": None}


def variant_of(
    p: Problem, x: Inputs, shape: config.Shape, chosen: config.Config, device: config.Architecture, *more: Tensor
) -> args.Variant:
    """The constants that are compiled in; `more` are tensors whose rows a kernel loads beside those of q, k and v."""
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
        HAS_SCORE_MOD=has_score_mod(p, x),
        # An error of the tanh is multiplied by the softcap; half precision forgives more.
        RELATIVE_TANH=p.softcap is not None and (p.dtype == torch.float32 or p.softcap > 100),
        PERMUTED=shape.permuted,
        ROWS_PER_PASS=config.rows_per_pass(chosen, shape, device),
        LAZY_RESCALE=config.lazy_rescale(device),
        ROW_SUMS=config.row_sums(shape),
        INT64_OFFSETS=_needs_int64_offsets(chosen, x.q, x.k, x.v, *more),
        PACK_GQA=shape.packed,
        PAGED=p.page_size > 0,
        ROTARY_DIM=p.rotary_dim,
        INTERLEAVED=p.rotary_interleaved,
    )


def has_score_mod(p: Problem, x: Inputs) -> bool:
    """False if scores are products times a positive scale, by which lse may be divided."""
    return not (p.scale > 1e-18 and p.softcap is None and x.bias is None and x.alibi_slopes is None)


def _needs_int64_offsets(chosen: config.Config, *tensors: Tensor) -> bool:
    """True if a block of rows of one of them spans 2^31 elements or more."""
    rows = max(chosen.block_m, chosen.block_n)
    return any(x.stride(0 if x.ndim == 3 else 2) * rows + x.stride(-1) * x.shape[-1] >= 2**31 for x in tensors)


def grid_tiles(p: Problem, rows: int, block: int) -> int:
    """Tiles of all sequences; how varlen sequences share theirs is in kernels/block_info.py."""
    return rows // block + p.batch + 1 if p.kind == "varlen" else -(-rows // block) * p.batch


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


def as_float32(x: float) -> float:
    """The float32 number that kernels receive. The interpreter would keep more digits, and differ from them."""
    return struct.unpack("f", struct.pack("f", x))[0]


def array_of(p: Problem, x: Tensor) -> args.Array:
    """q, k, v, out or a gradient of theirs."""
    if p.kind == "varlen":
        row, head, column = x.stride()
        return args.Array(x, 0, head, row, column)
    return args.Array(x, *x.stride())


def broadcast_array(x: Tensor | None) -> args.Array | None:
    """A mask or bias, with stride 0 where it has one element for all."""
    if x is None:
        return None
    strides = [0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
    return args.Array(x, *[0] * (4 - x.ndim), *strides)


def paging_of(p: Problem, x: Inputs) -> args.Paging | None:
    """Where the pages of a cache lie; None if it is contiguous."""
    table = x.block_table
    return None if table is None else args.Paging(table, table.shape[1], p.page_size, x.k.shape[0])


def rotation_of(x: Inputs) -> args.Rotation | None:
    """The tables of the rotary embedding, if there is one."""
    return None if x.cos is None else args.Rotation(x.cos, x.sin, x.cos.shape[0])


def slopes_array(p: Problem, x: Tensor | None) -> args.Array | None:
    """ALiBi's slopes, for each sequence and head."""
    if x is None:
        return None
    x = x.expand(p.batch, p.heads_q)
    batch, head = x.stride()
    return args.Array(x, batch, head, 0, 0)
