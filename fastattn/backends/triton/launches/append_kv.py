"""The launch that appends new keys and values to a cache."""

from __future__ import annotations

from ....kernels import append_kv, config
from ....kernels.launch import Launch
from ....problem import Inputs, Problem
from ..machine import Machine
from ..shape import shape_of
from .arguments import array_of, common_arguments, paging_of, rotation_of, variant_of


def append_kv_launch(problem: Problem, inputs: Inputs, machine: Machine) -> Launch:
    """The kernel that writes the new keys and values into the cache."""
    p, x, device = problem, inputs, machine.architecture(problem.device)
    assert x.k_new is not None
    assert x.v_new is not None
    shape = shape_of(p, packed=False)
    chosen = config.choose_append_kv(shape, device)
    common = common_arguments(p, x)
    values = {
        "k_new": array_of(p, x.k_new),
        "v_new": array_of(p, x.v_new),
        **{name: common[name] for name in ("k", "v", "heads", "kv_lengths", "batch", "seqlen_k", "seqlen_new")},
        "paging": paging_of(p, x),
        "rotation": rotation_of(x),
        "VARIANT": variant_of(p, x, shape, chosen, device),
    }
    grid = -(-p.seqlen_new // chosen.block_n) * p.batch * p.heads_kv
    return Launch(append_kv.append_kv, grid, values, chosen.num_warps, chosen.num_stages)
