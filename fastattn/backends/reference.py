"""The backend of last resort: plain PyTorch, any device, every feature."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Inputs, Problem
from ..reference import softmax_attention, softmax_attention_backward
from ..rotary import Rotary, apply_rotary
from .base import Backend, Grads, Needs, Preference, Results, empty_grad, empty_results


class ReferenceBackend(Backend):
    """Runs `fastattn.reference`."""

    name = "reference"

    def preference(self, problem: Problem) -> Preference:
        """It computes every call, and none of them fast."""
        return Preference.LAST_RESORT

    def forward(self, problem: Problem, inputs: Inputs, for_backward: bool) -> Results:
        """See `Backend.forward`."""
        out, lse = softmax_attention(problem, inputs)
        results = empty_results(problem, inputs.q, for_backward)
        results.out.copy_(out)
        results.lse.copy_(lse)
        if results.residual is not None:
            results.residual.zero_()  # `backward` computes everything anew
        return results

    def backward(
        self, problem: Problem, inputs: Inputs, results: Results, dout: Tensor, dlse: Tensor | None, needs: Needs
    ) -> Grads:
        """See `Backend.backward`."""
        grads = softmax_attention_backward(problem, inputs, dout, dlse)
        return Grads(
            *[
                empty_grad(like).copy_(grad) if need and grad is not None and like is not None else None
                for grad, like, need in zip(grads, inputs.differentiable, needs, strict=True)
            ]
        )

    def decode(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See `Backend.decode`."""
        return self.forward(problem, _with_whole_cache(problem, inputs), False)[:2]


# ----------------------------------------------------------------------------------------------------------- cache


def _with_whole_cache(problem: Problem, inputs: Inputs) -> Inputs:
    """Writes the new keys and values into the cache; returns the inputs of the dense call over all of it."""
    assert inputs.kv_lengths is not None
    before = inputs.kv_lengths.to(torch.int64)
    total = before + problem.seqlen_new
    q, k_new = inputs.q, inputs.k_new
    new_positions = before[:, None] + torch.arange(problem.seqlen_new, device=problem.device)
    if inputs.cos is not None and inputs.sin is not None:
        rotary = Rotary(inputs.cos, inputs.sin, problem.rotary_interleaved)
        if inputs.q_offset is not None:
            offset = inputs.q_offset.to(torch.int64)
        else:
            offset = total - problem.seqlen_q if problem.bottom_right else torch.zeros_like(total)
        # A query before the first position (more queries than keys) sees nothing: any angle will do.
        positions = (offset[:, None] + torch.arange(problem.seqlen_q, device=problem.device)).clamp(min=0)
        q = apply_rotary(q, rotary, positions)
        k_new = None if k_new is None else apply_rotary(k_new, rotary, new_positions)
    if k_new is not None and inputs.v_new is not None:
        _append(inputs.k, k_new, new_positions, inputs.block_table)
        _append(inputs.v, inputs.v_new, new_positions, inputs.block_table)
    return inputs._replace(
        q=q,
        k=_gather(inputs.k, inputs.block_table),
        v=_gather(inputs.v, inputs.block_table),
        kv_lengths=total.to(torch.int32),
    )


def _append(cache: Tensor, new: Tensor, positions: Tensor, block_table: Tensor | None) -> None:
    """Writes new (batch, heads_kv, seqlen_new, dim) at positions (batch, seqlen_new) of the cache."""
    if block_table is None:
        block = torch.arange(positions.shape[0], device=cache.device)[:, None]
        slot = positions
    else:
        page_size = cache.shape[2]
        block = block_table.to(torch.int64).gather(1, positions // page_size)
        slot = positions % page_size
    cache[block, :, slot] = new.transpose(1, 2)


def _gather(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """The cache as (batch, heads_kv, capacity, dim)."""
    if block_table is None:
        return cache
    if cache.shape[0] == 0:
        return cache.new_empty(
            block_table.shape[0], cache.shape[1], block_table.shape[1] * cache.shape[2], cache.shape[3]
        )
    # Entries after a sequence's last page mean nothing and may be out of range.
    pages = cache[block_table.clamp(0, cache.shape[0] - 1)]  # (batch, max_pages, heads_kv, page_size, dim)
    return pages.transpose(1, 2).flatten(2, 3)
