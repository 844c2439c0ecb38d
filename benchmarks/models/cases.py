"""What is measured on whole models: shapes, one frozen description of a piece of work, and the suite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..cases import DTYPES

WORKS = ("prefill", "decode", "encode", "train")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model under the names of the library's configurations, and its family."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    sliding_window: int | None = None


LLAMA = ModelShape("llama", 8192, 512, 1408, 4, 16, 4)
MISTRAL = ModelShape("mistral", 8192, 512, 1408, 4, 16, 4, sliding_window=256)
BERT = ModelShape("bert", 30522, 768, 3072, 4, 12, 12)  # BERT-base has 12 such layers


@dataclass(frozen=True)
class ModelCase:
    """One piece of work on one model.

    lengths: tokens of each sequence of the batch, padded on the right to the longest. For "decode" they are the tokens
    in the cache; each sequence gets one more.
    work: one of

        prefill  forward that fills a new cache and returns the logits of the last tokens
        decode   forward of one token per sequence with a `DynamicCache`, which is then cropped again
        encode   forward
        train    forward with loss, backward, and a step of AdamW

    Raises ValueError, naming the field, if the fields describe no work.
    """

    shape: ModelShape
    work: str
    lengths: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        for name, known in (("work", WORKS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must hold positive numbers, got {self.lengths}")
        if self.work in ("prefill", "decode") and len(set(self.lengths)) > 1:
            raise ValueError(f"lengths must be equal for {self.work}, which has no padding, got {self.lengths}")

    @property
    def family(self) -> str:
        """The architecture."""
        return self.shape.family

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return DTYPES[self.dtype]

    @property
    def seqlen(self) -> int:
        """Tokens of a sequence, padding included."""
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens that one call processes, without padding."""
        return len(self.lengths) if self.work == "decode" else sum(self.lengths)

    @property
    def name(self) -> str:
        """For tables: everything except the sizes of the model."""
        parts = [self.work, f"B{len(self.lengths)}", f"S{self.seqlen}", self.dtype]
        if self.shape.sliding_window is not None:
            parts.append(f"window {self.shape.sliding_window}")
        if len(set(self.lengths)) > 1:
            parts.append("padded " + "+".join(map(str, self.lengths)))
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The fields and the name, for people who read the file."""
        return {"name": f"{self.family}: {self.name}", **asdict(self)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ModelCase:
        """The case that `to_json` described."""
        return cls(ModelShape(**fields["shape"]), fields["work"], tuple(fields["lengths"]), fields["dtype"])


def _suite() -> Iterator[ModelCase]:
    padded = (512, 320, 192, 64)
    for dtype in ("float32", "bfloat16"):
        for seqlen in (512, 2048):
            yield ModelCase(LLAMA, "prefill", (seqlen,), dtype)
        for seqlen in (512, 2048):
            yield ModelCase(LLAMA, "decode", (seqlen,), dtype)
        yield ModelCase(MISTRAL, "prefill", (2048,), dtype)
        yield ModelCase(BERT, "encode", padded, dtype)
        yield ModelCase(LLAMA, "train", (512, 512), dtype)
        yield ModelCase(BERT, "train", padded, dtype)


MODELS = tuple(_suite())
"""The suite "models"."""
