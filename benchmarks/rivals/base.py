"""What a rival is: one way to compute attention, behind a small interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..cases import Case
from ..data import Data, join_packed, split

Call = Callable[[], tuple[Tensor, ...]]


class Rival(ABC):
    """One way to compute attention.

    name: as printed.
    ours: it is part of fastattn, so a wrong result fails the run.
    compiles: each new shape costs seconds or more to prepare, so it runs only on request.
    named_only: another rival stands for it, so it runs only on request.
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

        Work that a user does once for many calls (masks, views, compilation) is done here and is not timed.
        """

    def prepare(self, case: Case, data: Data) -> Call:
        """The call that is checked and timed. It returns (out,), or (out, dq, dk, dv) for training."""
        forward = self.forward(case, data)
        return _training(forward, data) if case.train else _inference(forward)


class PerSequence(Rival):
    """A rival that supports dense calls only. For varlen it is called once for each sequence."""

    @abstractmethod
    def dense(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """A function that computes out (batch, heads_q, seqlen_q, head_dim_v) of a dense call."""

    def forward(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """The dense call, or the dense calls and one concatenation."""
        calls = [self.dense(case, part) for part in split(case, data)]
        if not case.varlen:
            return calls[0]
        return lambda: join_packed([call() for call in calls])


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
