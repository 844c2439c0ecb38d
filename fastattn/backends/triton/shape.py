"""What configurations depend on of a call. Importing this does not import Triton."""

from __future__ import annotations

from ...kernels import config
from ...problem import Problem


def shape_of(p: Problem, *, packed: bool) -> config.Shape:
    """The shape of a call; packed: the heads of a group share tiles."""
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
