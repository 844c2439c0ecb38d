"""The launches of a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ....kernels import bwd_dbias, bwd_dkdv, bwd_dq, bwd_preprocess, config
from ....kernels.launch import Launch
from ....problem import Inputs, Problem
from ...base import Grads, Needs, Results, empty_grad, in_memory
from ..machine import Machine
from ..shape import shape_of
from .arguments import array_of, as_float32, common_arguments, grid_tiles, has_score_mod, residual_arguments, variant_of
from .dbias import PartialBiasGrad
from .dsinks import SinkRows, sinks_grad


class BackwardPass:
    """One backward pass over inputs from `kernel_inputs`: `launches`, after which `grads` gives the results."""

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
        residual = None if results.residual is None else in_memory(results.residual)
        self.stored = Results(in_memory(results.out), in_memory(results.lse), residual)
        self.lse, self.dout = self.stored.lse.contiguous(), in_memory(dout)
        self.dlse = None if dlse is None else in_memory(dlse).contiguous()
        self.delta = torch.empty(self.lse.shape, dtype=torch.float32, device=p.device)
        parts = 2 if p.dtype == torch.float32 else 1  # see kernels/bwd_preprocess.py
        self.row_lse = self.delta.new_empty((parts, *self.lse.shape))
        self.arguments = {
            **common_arguments(p, x),
            "dout": array_of(p, self.dout),
            "row_lse": self.row_lse,
            "delta": self.delta,
        }
        self.launches = [self._preprocess()]
        self.dq = self.dk = self.dv = self.dbias = None
        if needs.q:
            self.dq = empty_grad(x.q)
            self.launches.append(self._dq(self.dq))
        if needs.k or needs.v:
            self.dk, self.dv = empty_grad(x.k), empty_grad(x.v)
            self.launches.append(self._dkdv(self.dk, self.dv))
        if needs.bias and x.bias is not None:
            launch, self.dbias = self._dbias(x.bias)
            self.launches.append(launch)

    def grads(self) -> Grads:
        """The gradients, after the launches ran."""
        x, needs = self.inputs, self.needs
        return Grads(
            self.dq,
            self.dk if needs.k else None,
            self.dv if needs.v else None,
            None if self.dbias is None or x.bias is None else self.dbias.total(x.bias),
            self._dsinks(x.sinks) if needs.sinks and x.sinks is not None else None,
        )

    def _preprocess(self) -> Launch:
        p, block = self.problem, 16
        rows = self.lse.numel()
        arguments = {
            "out": array_of(p, self.stored.out),
            **residual_arguments(p, self.stored),
            "dout": self.arguments["dout"],
            "lse": self.lse,
            "dlse": self.dlse,
            "row_lse": self.row_lse,
            "delta": self.delta,
            "rows": rows,
            "heads_q": p.heads_q,
            "seqlen_q": p.seqlen_q,
            "scale": as_float32(p.scale),
            "BLOCK_M": block,
            "BLOCK_D": config.padded(p.head_dim_v),
            "DIM": p.head_dim_v,
            "HAS_SCORE_MOD": has_score_mod(p, self.inputs),
            "FLOAT32": p.dtype == torch.float32,
        }
        return Launch(bwd_preprocess.bwd_preprocess, -(-rows // block), arguments)

    def _launch(self, kernel: Any, grid: Callable[[config.Config], int], outputs: dict[str, Any]) -> Launch:
        """A launch over `grid` programs, in the configuration that the machine chooses."""

        def build(chosen: config.Config) -> list[Launch]:
            return [self._launch_as(chosen, kernel, grid(chosen), outputs)]

        return build(self.machine.choose(self.problem.device, kernel.__name__, self.shape, build))[0]

    def _launch_as(self, chosen: config.Config, kernel: Any, grid: int, outputs: dict[str, Any]) -> Launch:
        p = self.problem
        variant = variant_of(p, self.inputs, self.shape, chosen, self.machine.architecture(p.device), self.dout)
        arguments = {**self.arguments, **outputs, "VARIANT": variant}
        return Launch(kernel, grid, arguments, chosen.num_warps, chosen.num_stages)

    def _dq(self, dq: Tensor) -> Launch:
        p = self.problem

        def grid(chosen: config.Config) -> int:
            return grid_tiles(p, p.seqlen_q, chosen.block_m) * p.heads_q

        return self._launch(bwd_dq.bwd_dq, grid, {"dq": array_of(p, dq)})

    def _dkdv(self, dk: Tensor, dv: Tensor) -> Launch:
        p = self.problem

        def grid(chosen: config.Config) -> int:
            return grid_tiles(p, p.seqlen_k, chosen.block_n) * p.heads_kv

        return self._launch(bwd_dkdv.bwd_dkdv, grid, {"dk": array_of(p, dk), "dv": array_of(p, dv)})

    def _dbias(self, bias: Tensor) -> tuple[Launch, PartialBiasGrad]:
        p = self.problem
        chosen = config.choose("bwd_dbias", self.shape, self.machine.architecture(p.device))
        partial = PartialBiasGrad(p, bias, chosen)
        return self._launch_as(chosen, bwd_dbias.bwd_dbias, partial.grid, partial.arguments), partial

    def _dsinks(self, sinks: Tensor) -> Tensor:
        residual = self.stored.residual if self.problem.dtype == torch.float32 else None
        rows = SinkRows(self.lse, residual, self.delta, self.dlse, self.row_lse[0] == torch.inf)
        return sinks_grad(sinks, rows, varlen=self.problem.kind == "varlen")
