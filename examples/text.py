"""Real text that every machine has: the sources of Python's own standard library, one character a token."""

from __future__ import annotations

import math
import sysconfig
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

VALIDATION_EVERY = 10  # one file in ten


@dataclass(frozen=True)
class Corpus:
    """Text as tokens.

    characters: the vocabulary, in the order of the token ids. train, validation: int64 (length,), from different
    files. files: how many were read.
    """

    characters: str
    train: Tensor
    validation: Tensor
    files: int

    @cached_property
    def fingerprint(self) -> int:
        """Changes with the text, that is, with the version of Python."""
        return zlib.crc32(bytes(torch.cat([self.train, self.validation]).tolist()))

    def encode(self, text: str) -> Tensor:
        """Token ids, int64 (len(text),). Raises ValueError for a character that is not in the vocabulary."""
        unknown = set(text) - set(self.characters)
        if unknown:
            raise ValueError(f"text must consist of characters of the corpus, got {min(unknown)!r}")
        return torch.tensor([self.characters.index(c) for c in text], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The inverse of encode."""
        return "".join(self.characters[token] for token in tokens.tolist())

    def unigram_loss(self) -> float:
        """What predicting each character by its frequency alone costs on the validation text, in nats."""
        return _cross_entropy(_frequencies(self.train, (len(self.characters),)), (self.validation,))

    def bigram_loss(self) -> float:
        """Likewise for predicting each character from the one before it."""
        size = len(self.characters)
        pairs = _frequencies(self.train[:-1] * size + self.train[1:], (size, size))
        return _cross_entropy(pairs, (self.validation[:-1], self.validation[1:]))


def standard_library(max_characters: int) -> Corpus:
    """ASCII source files of the standard library, in the order of their names, as far as max_characters reach.

    Raises ValueError if this Python comes without them, or if max_characters are too few to validate with.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    train: list[str] = []
    validation: list[str] = []
    total = files = 0
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if not text.isascii() or total + len(text) > max_characters:
            continue
        files, total = files + 1, total + len(text)
        (validation if files % VALIDATION_EVERY == 0 else train).append(text)
    if not validation:
        raise ValueError(f"too few sources of the standard library in {folder} for {max_characters} characters")
    texts = ["".join(train), "".join(validation)]
    characters = "".join(sorted(set("".join(texts))))
    ids = torch.zeros(128, dtype=torch.int64)
    ids[[ord(c) for c in characters]] = torch.arange(len(characters))
    train_tokens, validation_tokens = (
        ids[torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8).long()] for text in texts
    )
    return Corpus(characters, train_tokens, validation_tokens, files)


def _frequencies(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Relative frequencies along the last dimension; one is added to each count, so that none is zero."""
    counts = torch.bincount(tokens, minlength=math.prod(shape)).double().view(shape) + 1.0
    return counts / counts.sum(dim=-1, keepdim=True)


def _cross_entropy(probabilities: Tensor, index: tuple[Tensor, ...]) -> float:
    return -probabilities[index].log().mean().item()
