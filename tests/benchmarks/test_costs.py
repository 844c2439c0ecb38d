"""Formulas for work and traffic against counting."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import costs, rivals
from benchmarks.cases import Case
from benchmarks.data import make_data

from .samples import BANDS, CPU, name_of, seen_by_the_rule, tiny, unequal_lengths


@pytest.mark.parametrize("case", BANDS, ids=name_of)
def test_pairs_and_keys_equal_a_count_of_every_pair(case: Case) -> None:
    tables = [seen_by_the_rule(case, *lengths) for lengths in case.sequences]
    assert costs.visible_pairs(case) == sum(sum(row) for table in tables for row in table)
    assert costs.keys_read(case) == sum(any(column) for table in tables for column in zip(*table, strict=True))


def test_flops_equal_what_torch_counts() -> None:
    case = dataclasses.replace(tiny(batch=2, heads=4, heads_kv=2, seqlen_k=40, mode="train"), head_dim_v=24)
    data = make_data(case, CPU)
    with FlopCounterMode(display=False) as forward:
        out = rivals.eager_attention(data.q, data.k, data.v, None, None)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out, (data.q, data.k, data.v), data.dout)
    assert costs.forward_flops(case) == forward.get_total_flops()
    # Eager keeps the probabilities; a fused backward computes q k^T once more.
    recomputed = 2 * case.batch * case.heads_q * case.seqlen_q * case.seqlen_k * case.head_dim
    assert costs.backward_flops(case) == backward.get_total_flops() + recomputed
    assert costs.flops(case) == costs.forward_flops(case) + costs.backward_flops(case)


def test_backward_costs_two_and_a_half_forwards_for_equal_head_dims() -> None:
    case = tiny(causal=True, mode="train")
    assert costs.backward_flops(case) == 2.5 * costs.forward_flops(case)
    assert costs.flops(tiny(causal=True)) == costs.forward_flops(case)


@pytest.mark.parametrize(
    "case",
    [
        tiny(),
        tiny(dtype="bfloat16", mask="additive"),
        tiny(mask="bool", heads=4, heads_kv=2),
        unequal_lengths(),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_bytes_are_those_of_the_tensors(case: Case, mode: str) -> None:
    case = dataclasses.replace(case, mode=mode, head_dim_v=24)
    data = make_data(case, CPU)
    read = sum(x.nbytes for x in (data.q, data.k, data.v, data.mask, data.bias) if x is not None)
    (out, *_) = rivals.Fastattn().prepare(case, data)()
    if mode == "forward":
        assert costs.bytes_moved(case) == read + out.nbytes
        return
    lse = 4 * out.numel() // case.head_dim_v
    gradients = data.q.nbytes + data.k.nbytes + data.v.nbytes
    assert costs.forward_bytes(case) == read + out.nbytes + lse
    assert costs.backward_bytes(case) == read + 2 * out.nbytes + lse + gradients
    assert costs.bytes_moved(case) == costs.forward_bytes(case) + costs.backward_bytes(case)


def test_keys_out_of_the_window_are_not_counted_as_read() -> None:
    step = tiny(seqlen=1, seqlen_k=100, window=(9, 0))
    assert costs.keys_read(step) == 10
    assert costs.forward_bytes(step) == 4 * 2 * 16 * (1 + 10 + 10 + 1)
