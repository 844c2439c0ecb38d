"""Shapes: the checks of a single argument, and the sizes of each kind of call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def check_rank(name: str, shape: Sequence[int], expected: str) -> None:
    """`expected` spells the shape, as in '(batch, heads, seqlen, head_dim)'."""
    rank = expected.count(",") + 1
    if len(shape) != rank:
        raise ValueError(f"{name} must have shape {expected}, {rank} dimensions, got shape {tuple(shape)}")


def check_shape(name: str, shape: Sequence[int], wanted: Sequence[int], spelled: str) -> None:
    """The shape must be exactly `wanted`."""
    if len(shape) != len(wanted) or any(a != b for a, b in zip(shape, wanted, strict=True)):
        raise ValueError(f"{name} must have shape {spelled} = {tuple(wanted)}, got {tuple(shape)}")


def check_heads(heads_q: int, heads_kv: int) -> None:
    """Query heads share key/value heads in equal groups."""
    if heads_q == heads_kv:
        return
    if heads_kv == 0 or heads_q % heads_kv != 0:
        raise ValueError(
            f"the heads of q must be a multiple of the heads of k and v, got {heads_q} and {heads_kv} heads"
        )


def check_broadcast(name: str, shape: Sequence[int], target: tuple[int | None, ...]) -> None:
    """The shape must broadcast to (batch, heads_q, seqlen_q, seqlen_k); None stands for 'known only on the device'."""
    spelled = "(batch, heads_q, seqlen_q, seqlen_k)"
    sizes = tuple("longest" if size is None else size for size in target)
    fits = len(shape) <= 4 and all(
        want is None or size == 1 or size == want for size, want in zip(reversed(shape), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must be broadcastable to {spelled} = {sizes}, got shape {tuple(shape)}")


def check_alternatives(
    kind: str, name: str, shape: Sequence[int], alternatives: Sequence[str], sizes: dict[str, int]
) -> None:
    """The shape must be one of those that a `TensorArgument` spells."""
    if alternatives == ("(...)",):
        rows = (None, None) if kind == "varlen" else (sizes["seqlen_q"], sizes["seqlen_k"])
        check_broadcast(name, shape, (sizes["batch"], sizes["heads_q"], *rows))
        return
    wanted = [tuple([sizes[dim] for dim in dims_of(spelled)]) for spelled in alternatives]
    if len(wanted) == 1:
        check_shape(name, shape, wanted[0], alternatives[0])
    elif tuple(shape) not in wanted:
        choices = " or ".join([f"{spelled} = {size}" for spelled, size in zip(alternatives, wanted, strict=True)])
        raise ValueError(f"{name} must have shape {choices}, got {tuple(shape)}")


def dims_of(spelled: str) -> tuple[str, ...]:
    """("batch", "heads_q") of "(batch, heads_q)"."""
    return tuple([dim.strip() for dim in spelled.strip("()").split(",") if dim.strip()])


def _dense_sizes(m: Any) -> dict[str, int]:
    q, k, v = m.q, m.k, m.v
    check_rank("q", q.shape, "(batch, heads_q, seqlen_q, head_dim)")
    check_rank("k", k.shape, "(batch, heads_kv, seqlen_k, head_dim)")
    check_rank("v", v.shape, "(batch, heads_kv, seqlen_k, head_dim_v)")
    batch, heads_q, seqlen_q, head_dim = q.shape
    _, heads_kv, seqlen_k, _ = k.shape
    check_shape("k", k.shape, (batch, heads_kv, seqlen_k, head_dim), "(batch, heads_kv, seqlen_k, head_dim)")
    check_shape("v", v.shape[:3], (batch, heads_kv, seqlen_k), "(batch, heads_kv, seqlen_k, ...)")
    check_heads(heads_q, heads_kv)
    return {
        "batch": batch,
        "heads_q": heads_q,
        "heads_kv": heads_kv,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "head_dim": head_dim,
        "head_dim_v": v.shape[3],
    }


def _varlen_sizes(m: Any) -> dict[str, int]:
    q, k, v, cu_q, cu_k = m.q, m.k, m.v, m.cu_seqlens_q, m.cu_seqlens_k
    check_rank("q", q.shape, "(total_q, heads_q, head_dim)")
    check_rank("k", k.shape, "(total_k, heads_kv, head_dim)")
    check_rank("v", v.shape, "(total_k, heads_kv, head_dim_v)")
    total_q, heads_q, head_dim = q.shape
    total_k, heads_kv, _ = k.shape
    check_shape("k", k.shape, (total_k, heads_kv, head_dim), "(total_k, heads_kv, head_dim)")
    check_shape("v", v.shape[:2], (total_k, heads_kv), "(total_k, heads_kv, ...)")
    check_heads(heads_q, heads_kv)
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if len(cu.shape) != 1 or cu.shape[0] < 1:
            raise ValueError(f"{name} must have shape (batch + 1,), got {tuple(cu.shape)}")
    if cu_q.shape[0] != cu_k.shape[0]:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have the same length batch + 1, "
            f"got {cu_q.shape[0]} and {cu_k.shape[0]}"
        )
    return {
        "batch": cu_q.shape[0] - 1,
        "heads_q": heads_q,
        "heads_kv": heads_kv,
        "seqlen_q": total_q,
        "seqlen_k": total_k,
        "head_dim": head_dim,
        "head_dim_v": v.shape[2],
    }


def _cache_sizes(m: Any) -> dict[str, int]:
    q, k, v, k_new, v_new, table = m.q, m.k, m.v, m.k_new, m.v_new, m.block_table
    check_rank("q", q.shape, "(batch, heads_q, seqlen_q, head_dim)")
    batch, heads_q, seqlen_q, head_dim = q.shape
    first, slots = ("batch", "capacity") if table is None else ("num_pages", "page_size")
    check_rank("k_cache", k.shape, f"({first}, heads_kv, {slots}, head_dim)")
    check_rank("v_cache", v.shape, f"({first}, heads_kv, {slots}, head_dim_v)")
    blocks, heads_kv, capacity, _ = k.shape
    if table is None:
        blocks = batch
    else:
        check_rank("block_table", table.shape, "(batch, max_pages)")
        check_shape("block_table", table.shape, (batch, table.shape[1]), "(batch, max_pages)")
        if capacity < 1:
            raise ValueError(f"k_cache must have a page_size of at least 1, got shape {tuple(k.shape)}")
    wanted = (blocks, heads_kv, capacity, head_dim)
    check_shape("k_cache", k.shape, wanted, f"({first}, heads_kv, {slots}, head_dim)")
    check_shape("v_cache", v.shape[:3], wanted[:3], f"({first}, heads_kv, {slots}, ...)")
    check_heads(heads_q, heads_kv)
    head_dim_v = v.shape[3]
    if (k_new is None) != (v_new is None):
        given, missing = ("k_new", "v_new") if v_new is None else ("v_new", "k_new")
        raise ValueError(f"k_new and v_new go together, got {given} without {missing}")
    if k_new is not None and v_new is not None:
        check_rank("k_new", k_new.shape, "(batch, heads_kv, seqlen_new, head_dim)")
        new = k_new.shape[2]
        check_shape("k_new", k_new.shape, (batch, heads_kv, new, head_dim), "(batch, heads_kv, seqlen_new, head_dim)")
        check_shape(
            "v_new", v_new.shape, (batch, heads_kv, new, head_dim_v), "(batch, heads_kv, seqlen_new, head_dim_v)"
        )
    if m.cos is not None:
        check_rotary(m.cos.shape, m.sin.shape, head_dim)
    return {
        "batch": batch,
        "heads_q": heads_q,
        "heads_kv": heads_kv,
        "seqlen_q": seqlen_q,
        "seqlen_k": capacity if table is None else table.shape[1] * capacity,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
    }


SIZES: dict[str, Callable[[Any], dict[str, int]]] = {
    "dense": _dense_sizes,
    "varlen": _varlen_sizes,
    "cache": _cache_sizes,
}
"""By the kind of the call; given an `Inputs` of shapes, after the checks of those."""


def check_rotary(cos: Sequence[int], sin: Sequence[int], head_dim: int) -> None:
    """The shapes of the tables must be (max_positions, rotary_dim // 2), rotary_dim at most the head dimension."""
    check_rank("rotary.cos", cos, "(max_positions, rotary_dim // 2)")
    check_shape("rotary.sin", sin, cos, "rotary.cos's shape")
    if 2 * cos[1] > head_dim:
        raise ValueError(f"rotary.cos has {cos[1]} columns, but head_dim {head_dim} allows at most {head_dim // 2}")
