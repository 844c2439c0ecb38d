"""Generation token by token, the same loop for every model, with and without a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .blocks import LayerCache
from .checks import check_count
from .sampling import Sampler

Run = Callable[[Tensor, Tensor | None, Sequence[LayerCache] | None], Tensor]
"""The model as generation sees it: run(ids, real, caches) gives logits (batch, n, vocab_size).

ids (batch, n) stand behind whatever the caches hold; real (batch, n), bool, None = all.
"""


class Cached:
    """Next-token logits; each token is computed once, its keys and values stay in the caches."""

    def __init__(self, run: Run, caches: Sequence[LayerCache]) -> None:
        self.run, self.caches = run, caches

    def begin(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits (batch, vocab_size) behind prompts of `lengths`, which begin at column 0 of ids."""
        logits = self.run(ids, None, self.caches)
        for cache in self.caches:
            cache.own.truncate(lengths)  # what stands behind the shorter prompts was padding
        return _at(logits, lengths - 1)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits behind one more token per row, (batch,)."""
        return self.run(tokens[:, None], None, self.caches)[:, -1]


class Recomputed:
    """Next-token logits; the whole sequence is computed for each token. Slow, but nothing is kept."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def begin(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """As Cached.begin."""
        self.ids, self.lengths = ids, lengths
        return self._logits()

    def step(self, tokens: Tensor) -> Tensor:
        """As Cached.step."""
        self.ids = torch.nn.functional.pad(self.ids, (0, 1))
        self.ids[torch.arange(len(tokens), device=tokens.device), self.lengths] = tokens
        self.lengths = self.lengths + 1
        return self._logits()

    def _logits(self) -> Tensor:
        real = torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]
        return _at(self.run(self.ids, real, None), self.lengths - 1)


def continue_prompts(
    decoder: Cached | Recomputed,
    ids: Tensor,
    lengths: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    eos_token_id: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """New tokens (batch, n), n <= max_new_tokens, behind prompts of `lengths` in ids (batch, longest).

    A row that has produced eos_token_id goes on with eos_token_id; when all have, generation ends.
    """
    if max_new_tokens == 0:
        return ids[:, :0]
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    logits = decoder.begin(ids, lengths)
    tokens: list[Tensor] = []
    while True:
        token = sampler(logits, generator).to(ids.dtype)
        if eos_token_id is not None:
            token = token.masked_fill(finished, eos_token_id)
            finished = finished | (token == eos_token_id)
        tokens.append(token)
        if len(tokens) == max_new_tokens or (eos_token_id is not None and bool(finished.all())):
            return torch.stack(tokens, dim=1)
        logits = decoder.step(token)


def check_not_empty(name: str, prompt: Tensor) -> None:
    """Something to begin with, in (batch, seqlen, ...)."""
    if 0 in prompt.shape[:2]:
        raise ValueError(f"{name} must have at least one row and one token, got shape {tuple(prompt.shape)}")


def check_generation(
    max_new_tokens: int, eos_token_id: int | None, vocab_size: int, use_cache: bool, backend: str | None
) -> None:
    """What every `generate` checks of its arguments, beside the prompt and the sampling."""
    check_count("max_new_tokens", max_new_tokens, least=0)
    if eos_token_id is not None:
        check_count("eos_token_id", eos_token_id, least=0)
        if eos_token_id >= vocab_size:
            raise ValueError(f"eos_token_id must be less than vocab_size = {vocab_size}, got {eos_token_id}")
    if use_cache and backend == "torch":
        raise ValueError('use_cache must be False for a model with backend="torch", got True')


def gather_prompts(ids: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ids, lengths): the real tokens of each row moved to its beginning, wherever the padding was."""
    if real is None:
        return ids, torch.full((len(ids),), ids.shape[1], device=ids.device)
    lengths = real.sum(dim=1)
    if int(lengths.min()) == 0:
        row = int(lengths.argmin())
        raise ValueError(f"attention_mask must mark at least one real token per row, got none in row {row}")
    order = torch.argsort((~real).int(), dim=1, stable=True)
    return ids.gather(1, order)[:, : int(lengths.max())], lengths


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's mode as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _at(logits: Tensor, positions: Tensor) -> Tensor:
    """logits (batch, n, vocab_size) of one position per row."""
    return logits[torch.arange(len(logits), device=logits.device), positions]
