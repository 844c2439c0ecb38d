"""Choosing the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_count, check_number


@dataclass(frozen=True)
class Sampler:
    """Picks one token per row of logits.

        do_sample     False: the most probable token; the others must then keep their defaults
        temperature   logits are divided by it; above 0
        top_k         only the k most probable tokens
        top_p         only the fewest most probable tokens that together have this probability, in (0, 1];
                      after top_k

    Source of top_p: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020).
    Raises TypeError or ValueError for a value outside its range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.top_p is not None:
            check_number("top_p", self.top_p)
            if not 0 < self.top_p <= 1:
                raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, None, None):
            raise ValueError("temperature, top_k and top_p need do_sample=True, got do_sample=False")

    def __call__(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """logits (batch, vocab_size) -> token ids (batch,)."""
        if not self.do_sample:
            return logits.argmax(dim=-1)
        probs = torch.softmax(self.filtered(logits), dim=-1)
        return torch.multinomial(probs, 1, generator=generator)[:, 0]

    def filtered(self, logits: Tensor) -> Tensor:
        """Logits in float32 over the temperature, -inf for the tokens that are out."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept, tokens = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, tokens, kept)
        if self.top_p is not None:
            ordered, tokens = logits.sort(dim=-1, descending=True)
            probs = torch.softmax(ordered, dim=-1)
            before = probs.cumsum(dim=-1) - probs  # of the tokens ahead: 0 for the first, which always stays
            ordered = ordered.masked_fill(before >= self.top_p, -torch.inf)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, tokens, ordered)
        return logits
