"""The same language model trained twice, step by step in turn: on fastattn and on PyTorch's own attention."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastattn.nn import TransformerLM

from .text import Corpus

TORCH = "torch"  # the backend name under which fastattn.nn computes a model by PyTorch's own attention
WARM_UP = 3  # steps that no timing counts: memory is allocated, threads are started


@dataclass(frozen=True)
class Settings:
    """What decides a run, bit for bit, on one machine. Steps are optimiser steps, lengths are in tokens."""

    steps: int = 400
    batch: int = 16
    context: int = 128
    embedding_dim: int = 128
    hidden_dim: int = 512
    heads: int = 4
    layers: int = 2
    dropout: float = 0.0
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    seed: int = 0
    backend: str | None = None
    device: str = "cpu"

    def rate(self, step: int) -> float:
        """The learning rate: a linear warm-up over a tenth of the steps, then a cosine down to a tenth."""
        warm_up = max(self.steps // 10, 1)
        if step < warm_up:
            return self.learning_rate * (step + 1) / warm_up
        progress = (step - warm_up) / max(self.steps - warm_up, 1)
        return self.learning_rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * progress)))


@dataclass
class Arm:
    """One of the models that are trained beside each other, and its history: one loss and one time a step."""

    model: TransformerLM
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, tokens: Tensor, rate: float) -> None:
        """One optimiser step on tokens (batch, context + 1)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        _synchronize(tokens.device)
        start = time.perf_counter()
        loss = next_token_loss(self.model, tokens)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        _synchronize(tokens.device)
        self.seconds.append(time.perf_counter() - start)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the history."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = list(state["losses"]), list(state["seconds"])


class Training:
    """Two models with the same first weights that see the same batches; `arms` by name."""

    def __init__(self, settings: Settings, corpus: Corpus) -> None:
        self.settings, self.corpus = settings, corpus
        self.device = torch.device(settings.device)
        ours = _model(settings, len(corpus.characters), settings.backend)
        theirs = _model(settings, len(corpus.characters), TORCH)
        theirs.load_state_dict(ours.state_dict())
        self.arms = {"fastattn": _arm(ours, settings), "torch": _arm(theirs, settings)}
        self.batches = torch.Generator().manual_seed(settings.seed)
        self.validation: list[tuple[int, float]] = []
        self.step = 0

    def advance(self) -> None:
        """One step of each model; they take turns in going first, so that neither gets the warmer caches."""
        tokens = sample(self.corpus.train, self.settings, self.batches).to(self.device)
        arms = list(self.arms.values())
        for arm in arms if self.step % 2 == 0 else reversed(arms):
            arm.step(tokens, self.settings.rate(self.step))
        self.step += 1

    def validate(self) -> None:
        """Notes fastattn's loss on the validation text for the step reached."""
        self.validation.append((self.step, self.validation_loss("fastattn")))

    @torch.no_grad()
    def validation_loss(self, name: str, batches: int = 8) -> float:
        """Mean loss of an arm on the same few batches of the validation text, in nats a character."""
        generator = torch.Generator().manual_seed(1)
        model = self.arms[name].model.eval()
        losses = [
            next_token_loss(model, sample(self.corpus.validation, self.settings, generator).to(self.device))
            for _ in range(batches)
        ]
        model.train()
        return torch.stack(losses).mean().item()

    def tokens_per_second(self, name: str) -> float:
        """Median over the steps behind the warm-up, forward, backward and optimiser."""
        seconds = self.arms[name].seconds
        measured = seconds[WARM_UP:] or seconds
        return self.settings.batch * self.settings.context / statistics.median(measured)

    def differences(self) -> list[float]:
        """How far the two training losses are apart, step by step."""
        ours, theirs = (arm.losses for arm in self.arms.values())
        return [abs(a - b) for a, b in zip(ours, theirs, strict=True)]

    def state(self) -> dict[str, Any]:
        """For a checkpoint; a run restored from it goes on as if it had never stopped, bit for bit."""
        cuda = self.device.type == "cuda"
        return {
            "settings": self.identity(),
            "step": self.step,
            "validation": [list(point) for point in self.validation],
            "batches": self.batches.get_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
            "arms": {name: arm.state() for name, arm in self.arms.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of state."""
        self.step = state["step"]
        self.validation = [(step, loss) for step, loss in state["validation"]]
        self.batches.set_state(state["batches"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        for name, arm in self.arms.items():
            arm.restore(state["arms"][name])

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to continue this run."""
        return {**asdict(self.settings), "corpus": self.corpus.fingerprint}


def next_token_loss(model: TransformerLM, tokens: Tensor) -> Tensor:
    """Cross-entropy of predicting tokens[:, 1:] from what stands before each, in nats."""
    logits = model(tokens[:, :-1])
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def sample(tokens: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """Random pieces of the text, (batch, context + 1)."""
    starts = torch.randint(len(tokens) - settings.context, (settings.batch,), generator=generator)
    return tokens[starts[:, None] + torch.arange(settings.context + 1)]


def _model(settings: Settings, vocab_size: int, backend: str | None) -> TransformerLM:
    torch.manual_seed(settings.seed)
    model = TransformerLM(
        vocab_size,
        settings.embedding_dim,
        settings.hidden_dim,
        settings.heads,
        settings.layers,
        dropout=settings.dropout,
        backend=backend,
    )
    return model.to(settings.device)


def _arm(model: TransformerLM, settings: Settings) -> Arm:
    """With AdamW, whose weight decay leaves biases and norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return Arm(model, torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95)))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
