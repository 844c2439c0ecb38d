"""This package as a rival: automatic choice, or one backend by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import fastattn

from ..cases import Case
from ..data import Data, options
from .base import Rival


class Fastattn(Rival):
    """This package, with the backend of that name or with automatic choice."""

    ours = True

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend
        self.name = "fastattn" if backend is None else f"fastattn:{backend}"

    def why_not(self, case: Case, data: Data) -> str | None:
        """fastattn's own reason for the named backend. Automatic choice must find a backend for every case."""
        if self.backend is None:
            return None
        try:
            fastattn.explain(data.q, data.k, data.v, **_cu_seqlens(data), **self._arguments(case, data))
        except ValueError as error:
            return str(error)
        return None

    def forward(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """`fastattn.attention` or `fastattn.attention_varlen`."""
        arguments = self._arguments(case, data)
        if case.varlen:
            return lambda: fastattn.attention_varlen(data.q, data.k, data.v, **_cu_seqlens(data), **arguments)
        return lambda: fastattn.attention(data.q, data.k, data.v, **arguments)

    def _arguments(self, case: Case, data: Data) -> dict[str, Any]:
        return {**options(case, data), "backend": self.backend}


def _cu_seqlens(data: Data) -> dict[str, Any]:
    if data.cu_seqlens_q is None:
        return {}
    return {"cu_seqlens_q": data.cu_seqlens_q, "cu_seqlens_k": data.cu_seqlens_k}
