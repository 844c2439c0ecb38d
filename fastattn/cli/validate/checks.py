"""Runs one validation case on one backend and compares every result with the oracle.

What may be rounded is bounded by `fastattn.cli.tolerance`. What must be exact is counted: one for each wrong element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import functional
from .. import tolerance
from . import oracle
from .cases import Case
from .data import Data, make_data


@dataclass(frozen=True)
class Check:
    """One compared result. eager is None where it must be exact: then error counts the wrong elements.

    note: a sentence where there is more to say, such as the error that a call raised.
    """

    quantity: str
    error: float
    eager: float | None
    bound: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the result is within its bound; NaN is not."""
        return self.error <= self.bound

    @property
    def share(self) -> float:
        """The error as a part of the bound, to find the worst of several checks."""
        if not self.ok:
            return float("inf")
        return self.error / self.bound if self.bound else 0.0


def run_case(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> tuple[list[Check], str | None]:
    """(checks, None), or ([], the backend's reason) where the backend says that it does not do such calls."""
    try:
        return _KINDS[case.kind](case, backend, dtype, device), None
    except Exception as error:  # whatever a backend raises is a finding, not the end of the run
        text = f"{type(error).__name__}: {error}"
        refusal = f"backend {backend!r} cannot compute this call: "
        if isinstance(error, ValueError) and str(error).startswith(refusal):
            return [], str(error).removeprefix(refusal)
        return [Check("call", float("inf"), None, 0.0, text)], None


# ------------------------------------------------------------------------------------------------- comparison


def compare(quantity: str, result: Tensor, truth: Tensor, eager: Tensor, dtype: torch.dtype) -> Check:
    """One result beside the truth (float64) and what eager attention makes of it."""
    if result.shape != truth.shape:
        note = f"shape {tuple(result.shape)} instead of {tuple(truth.shape)}"
        return Check(quantity, float("inf"), None, 0.0, note)
    eager_error = tolerance.eager_error(eager, truth)
    bound = tolerance.bound(truth, eager_error, dtype)
    astray = int(tolerance.misplaced(result, truth).sum())
    note = f"{astray} elements are NaN or infinite in one of result and truth alone" if astray else ""
    return Check(quantity, tolerance.max_error(result, truth), eager_error, bound, note)


def exact(quantity: str, result: Tensor, wanted: Tensor) -> Check:
    """Counts the elements that differ; NaN equals NaN."""
    differs = (result != wanted) & ~(result.isnan() & wanted.isnan())
    return Check(quantity, int(differs.sum()), None, 0.0)


# --------------------------------------------------------------------------------------- dense, varlen, merge

Attend = Callable[[Data], tuple[Tensor, Tensor]]


def _results(data: Data, attend: Attend, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """out, lse and the gradient of every differentiable tensor."""
    data, leaves = data.leaves(dtype)
    out, lse = attend(data)
    found = torch.autograd.grad((out, lse), tuple(leaves.values()), (data.dout, data.dlse), materialize_grads=True)
    return {"out": out, "lse": lse} | {f"d{name}": x for name, x in zip(leaves, found, strict=True)}


def _compare_all(data: Data, results: dict[str, Tensor], dtype: torch.dtype) -> list[Check]:
    truth = _results(data, oracle.attend, torch.float64)
    eager = _results(data, oracle.attend, dtype)
    checks = [compare(name, results[name], truth[name], eager[name], dtype) for name in truth]
    hidden = truth["lse"] == -torch.inf
    if hidden.any() and all(check.ok for check in checks):
        rows = hidden.transpose(0, 1) if results["out"].ndim == 3 else hidden
        dq_rows = results["dq"][rows]
        checks += [exact("hidden out", results["out"][rows], torch.zeros_like(results["out"][rows]))]
        checks += [exact("hidden dq", dq_rows, torch.zeros_like(dq_rows))]
    return checks


def _attention(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> list[Check]:
    call = functional.attention_varlen if case.kind == "varlen" else functional.attention

    def attend(data: Data) -> tuple[Tensor, Tensor]:
        return call(data.q, data.k, data.v, **data.options, return_lse=True, backend=backend)

    data = make_data(case, dtype, device)
    results = _results(data, attend)
    checks = _compare_all(data, results, dtype)
    if case.kind == "dense" and results["out"].numel():
        order, wanted = _outer_order(results["out"]), _outer_order(data.q)
        checks.append(Check("order in memory", int(order != wanted), None, 0.0))
    if case.repeat:
        with _other_threads():
            again = _results(data, attend)
        checks += [exact(f"{name} again", again[name], results[name]) for name in results]
    return checks


def _outer_order(x: Tensor) -> list[int]:
    """The dimensions but the last, by descending stride."""
    strides = x.stride()
    return sorted(range(x.ndim - 1), key=lambda d: -strides[d])


@contextmanager
def _other_threads() -> Iterator[None]:
    """Runs with one thread, or with two where one is the rule."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _merge(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> list[Check]:
    def attend(data: Data) -> tuple[Tensor, Tensor]:
        parts = zip(data.k.split(20, dim=2), data.v.split(20, dim=2), strict=True)
        states = [functional.attention(data.q, k, v, return_lse=True, backend=backend) for k, v in parts]
        outs, lses = zip(*states, strict=True)
        return functional.merge_states(outs, lses)

    data = make_data(case, dtype, device)
    return _compare_all(data, _results(data, attend), dtype)


# ------------------------------------------------------------------------------------------------------ cache


def _cache(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> list[Check]:
    data = make_data(case, dtype, device)
    caches = {"k": data.k.clone(), "v": data.v.clone()}
    out, lse = functional.attention_with_kv_cache(
        data.q, caches["k"], caches["v"], **data.options, return_lse=True, backend=backend
    )
    truth, eager = (oracle.attend_with_cache(data.leaves(x)[0]) for x in (torch.float64, dtype))
    checks = [
        compare("out", out, truth[0].detach(), eager[0], dtype),
        compare("lse", lse, truth[1].detach(), eager[1], dtype),
    ]
    for place, name in ((2, "k"), (3, "v")):
        rows = _new_rows(case, data)
        if rows:
            written = torch.stack([caches[name][row] for row in rows]).unflatten(0, (case.batch, -1)).transpose(1, 2)
            checks.append(compare(f"new {name}", written, truth[place].detach(), eager[place], dtype))
        for row in rows:
            caches[name][row] = getattr(data, name)[row]
        checks.append(exact(f"rest of {name} cache", caches[name], getattr(data, name)))
    return checks


def _new_rows(case: Case, data: Data) -> list[tuple[Any, ...]]:
    """Where the call must have written, in order: indices of (heads_kv, dim) rows of the cache."""
    assert case.cache is not None
    size, table = case.cache.page_size, data.options.get("block_table")
    rows: list[tuple[Any, ...]] = []
    for b, length in enumerate(case.cache.lengths):
        for p in range(length, length + case.cache.new):
            block, slot = (b, p) if table is None else (int(table[b, p // size]), p % size)
            rows.append((block, slice(None), slot))
    return rows


# ---------------------------------------------------------------------------------------------------- dropout


def _dropout_mask(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> list[Check]:
    """Makes the mask visible: zero queries give equal probabilities, the identity as v and dout copies."""
    n, dim = case.seqlens[0], case.head_dims[0]
    batch, heads, p, seed = case.batch, case.heads[0], 0.3, 2**40 + 5
    packed = bool(case.lengths)
    rows = batch * n
    shape = (rows, heads) if packed else (batch, heads, n)
    q, k = (
        torch.zeros(*shape, dim, dtype=dtype, device=device),
        torch.ones(*shape, dim, dtype=dtype, device=device),
    )
    eye = torch.eye(n, dtype=dtype, device=device)
    v = (eye.repeat(batch, 1)[:, None] if packed else eye).expand(*shape, n).contiguous().requires_grad_()
    if packed:
        cu = torch.arange(0, rows + 1, n, dtype=torch.int32, device=device)
        out = functional.attention_varlen(q, k, v, cu, cu, dropout_p=p, seed=seed, backend=backend)
    else:
        out = functional.attention(q, k, v, dropout_p=p, seed=seed, backend=backend)
    (dv,) = torch.autograd.grad(out, v, v.detach())
    keep = torch.stack([oracle.dropout_keep(seed, p, b, (heads, n, n)) for b in range(batch)]).to(device)
    seen = {"forward": out.detach(), "backward": dv}
    if packed:
        seen = {name: x.unflatten(0, (batch, n)).transpose(1, 2) for name, x in seen.items()}
    return [
        exact("forward mask", seen["forward"] != 0, keep),
        exact("backward mask", seen["backward"] != 0, keep.transpose(2, 3)),
    ]


_KINDS: dict[str, Callable[[Case, str, torch.dtype, torch.device], list[Check]]] = {
    "dense": _attention,
    "varlen": _attention,
    "merge": _merge,
    "cache": _cache,
    "dropout mask": _dropout_mask,
}
