"""What is measured: fastattn's backends and other exact attentions, behind one small interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fastattn

from ..cases import Case
from ..data import Data, hidden_pairs, join_packed, options, split
from ..machine import free_memory

Call = Callable[[], tuple[Tensor, ...]]


class Rival(ABC):
    """One way to compute attention.

    name: as printed. ours: part of fastattn, so that a wrong result fails the run. compiles: takes seconds or
    more to prepare each new shape, hence runs only when asked for. named_only: likewise, as another rival stands
    for it.
    """

    name: str
    ours = False
    compiles = False
    named_only = False

    def why_not(self, case: Case, data: Data) -> str | None:
        """None if the rival can compute the case on these tensors here, else a sentence."""
        return None

    @abstractmethod
    def forward(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """A function that computes out, in the layout of `fastattn.attention` (or `attention_varlen`).

        What a user would do once for many calls (masks, views, compilation) is done here, outside of it.
        """

    def prepare(self, case: Case, data: Data) -> Call:
        """The call that is checked and timed: gives (out,), or for training (out, dq, dk, dv)."""
        forward = self.forward(case, data)
        return _training(forward, data) if case.train else _inference(forward)


def _inference(forward: Callable[[], Tensor]) -> Call:
    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (forward(),)

    return call


def _training(forward: Callable[[], Tensor], data: Data) -> Call:
    def call() -> tuple[Tensor, ...]:
        out = forward()
        return (out, *torch.autograd.grad(out, (data.q, data.k, data.v), data.dout))

    return call


class Fastattn(Rival):
    """This package: the backend of that name, or the one that automatic choice takes."""

    ours = True

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend
        self.name = "fastattn" if backend is None else f"fastattn:{backend}"

    def why_not(self, case: Case, data: Data) -> str | None:
        """What fastattn says about the named backend; automatic choice must find one for every case."""
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


class PerSequence(Rival):
    """A rival that knows dense calls only: for varlen it is called once for each sequence."""

    @abstractmethod
    def dense(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """A function that computes out (batch, heads_q, seqlen_q, head_dim_v) of a dense call."""

    def forward(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """The dense call, or the dense calls and one concatenation."""
        calls = [self.dense(case, part) for part in split(case, data)]
        if not case.varlen:
            return calls[0]
        return lambda: join_packed([call() for call in calls])


class Sdpa(PerSequence):
    """torch.nn.functional.scaled_dot_product_attention, stating each case in the cheapest way that it offers.

    is_causal where its upper-left alignment is the case's, no mask where nothing is hidden, else a dense mask
    made beforehand; enable_gqa for grouped heads; a loop over the sequences for varlen.
    """

    name = "sdpa"

    def dense(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """One scaled_dot_product_attention."""
        q, k, v = data.q, data.k, data.v
        arguments: dict[str, Any] = self._mask(case, data)
        if case.heads_q != case.heads_kv:
            arguments["enable_gqa"] = True
        return lambda: scaled_dot_product_attention(q, k, v, **arguments)

    def _mask(self, case: Case, data: Data) -> dict[str, Any]:
        seqlen_q, seqlen_k = data.q.shape[2], data.k.shape[2]
        aligned = seqlen_q == seqlen_k or case.causal_alignment == "top-left"
        if case.causal and aligned and case.window is None and case.mask == "none":
            return {"is_causal": True}
        hidden = hidden_pairs(case, seqlen_q, seqlen_k, data.mask, data.q.device)
        if data.bias is not None:
            return {"attn_mask": data.bias if hidden is None else data.bias.masked_fill(hidden, -torch.inf)}
        return {} if hidden is None else {"attn_mask": ~hidden}


class Eager(PerSequence):
    """matmul, softmax, matmul, in the dtype of the inputs: what people write by hand."""

    name = "eager"

    def why_not(self, case: Case, data: Data) -> str | None:
        """Refuses what would not fit into memory."""
        scores = case.batch * case.heads_q * case.seqlen_q * case.seqlen_k * case.torch_dtype.itemsize
        # Scores, probabilities and one temporary; training holds their gradients as well.
        needed, free = scores * (6 if case.train else 3), free_memory(data.q.device)
        if free is not None and needed > free:
            return f"it would need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return None

    def dense(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """One `eager_attention`."""
        hidden = hidden_pairs(case, data.q.shape[2], data.k.shape[2], data.mask, data.q.device)
        return lambda: eager_attention(data.q, data.k, data.v, hidden, data.bias)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, bias: Tensor | None) -> Tensor:
    """Plain attention, each step rounded to the dtype of q; hidden and bias broadcast to the scores."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v
