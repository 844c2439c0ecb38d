"""Which backend computes a call, and why each other does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..kernels.machine import machine
from ..problem import Inputs, Problem
from .base import Backend
from .native.cpu import CpuBackend
from .native.cuda import CudaBackend, Gpu
from .reference import ReferenceBackend
from .triton import TritonBackend

BACKENDS: tuple[Backend, ...] = (CudaBackend(Gpu()), TritonBackend(machine()), CpuBackend(), ReferenceBackend())
"""In the order in which automatic choice tries them, if they prefer a call alike."""


@dataclass(frozen=True)
class Report:
    """What `fastattn.explain` found. str() of it is meant for people.

    backend: the name of the backend that runs the call. reasons: for each other backend, a sentence that says why
    it is not the one. problem: the description of the call that the backends judged. notes: sentences on what the
    chosen backend has to do first, such as copies.
    """

    backend: str
    reasons: dict[str, str]
    problem: Problem
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        p = self.problem
        lines = [
            f"This call runs on the backend '{self.backend}'.",
            f"  call: {p.kind}, q ({p.batch}, {p.heads_q}, {p.seqlen_q}, {p.head_dim}), k ({p.batch}, {p.heads_kv}, "
            f"{p.seqlen_k}, {p.head_dim}), head_dim_v {p.head_dim_v}, {p.dtype}, {p.device}, "
            f"features: {', '.join(sorted(p.features))}",
        ]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines + [f"  not '{name}': {reason}" for name, reason in self.reasons.items()])


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, the preferred one first."""
    return [backend.name for backend in BACKENDS if backend.why_unavailable() is None]


def why_not(backend: Backend, problem: Problem) -> str | None:
    """None if the backend can compute the call here, else a sentence."""
    return backend.why_unavailable() or backend.why_not(problem)


def by_name(name: str) -> Backend:
    """The backend of that name, available or not. Raises ValueError for an unknown name."""
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string or None, got {type(name).__name__} {name!r}")
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"backend must be None or one of {[b.name for b in BACKENDS]}, got {name!r}")


def in_order(problem: Problem) -> Sequence[Backend]:
    """The backends in the order in which automatic choice tries them for a call."""
    return sorted(BACKENDS, key=lambda backend: -backend.preference(problem))  # stable: ties keep their order


class Refusal(ValueError):
    """No backend of those asked for can compute the call."""


def choose(problem: Problem, name: str | None) -> Backend:
    """The backend named, or else the first that can compute the call.

    Raises ValueError if the named backend is unknown, and Refusal if it cannot compute the call, with the reason.
    """
    candidates = in_order(problem) if name is None else (by_name(name),)
    reasons = []
    for backend in candidates:
        reason = why_not(backend, problem)
        if reason is None:
            return backend
        reasons.append(f"backend {backend.name!r} cannot compute this call: {reason}")
    raise Refusal("; ".join(reasons))


_choose_cached = lru_cache(maxsize=4096)(choose)


def choose_cached(problem: Problem, name: str | None) -> Backend:
    """`choose`, once per problem."""
    if name is not None and not isinstance(name, str):
        by_name(name)  # refuses it; it may not even be hashable
    return _choose_cached(problem, name)


def explain_choice(problem: Problem, inputs: Inputs, name: str | None) -> Report:
    """The choice for a described call, with a sentence for each backend not chosen."""
    chosen = choose(problem, name)
    reasons = {}
    for backend in BACKENDS:
        if backend is not chosen:
            reasons[backend.name] = why_not(backend, problem) or (
                f"it can compute this call, but {chosen.name!r} {_advantage(chosen, backend, name)}"
            )
    return Report(chosen.name, reasons, problem, tuple(chosen.notes(problem, inputs)))


def _advantage(chosen: Backend, other: Backend, name: str | None) -> str:
    if name is not None:
        return "was asked for by name."
    if BACKENDS.index(chosen) < BACKENDS.index(other):
        return "comes first."
    return "is faster for calls this large on this GPU."
