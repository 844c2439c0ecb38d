"""The tensors of a case: what its mask hides, and copies that no cache holds."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.data import hidden_pairs, make_cold_data

from .samples import BANDS, CPU, name_of, seen_by_the_rule, tiny


@pytest.mark.parametrize("case", BANDS, ids=name_of)
def test_hidden_pairs_follow_the_rule(case: Case) -> None:
    for lengths in case.sequences:
        seen = torch.tensor(seen_by_the_rule(case, *lengths))
        hidden = hidden_pairs(case, *lengths, None, CPU)
        assert torch.equal(seen, torch.ones_like(seen) if hidden is None else ~hidden)


def test_cold_copies_exceed_the_cache_and_hold_the_same_values() -> None:
    case = tiny(seqlen=1, seqlen_k=64, cold=True)
    copies = make_cold_data(case, CPU, cache_bytes=100_000)
    kv_bytes = copies[0].k.nbytes + copies[0].v.nbytes
    assert (len(copies) - 1) * kv_bytes >= 2 * 100_000 > (len(copies) - 2) * kv_bytes
    assert len({data.k.data_ptr() for data in copies} | {data.v.data_ptr() for data in copies}) == 2 * len(copies)
    assert all(torch.equal(data.k, copies[0].k) and torch.equal(data.v, copies[0].v) for data in copies)
