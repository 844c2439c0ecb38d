"""What is measured: one frozen description of an attention call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
MODES = ("forward", "train")
MASKS = ("none", "bool", "additive")
ALIGNMENTS = ("bottom-right", "top-left")


@dataclass(frozen=True)
class Case:
    """One attention call, hashable and printable.

    Sizes are in elements.
    mode: "forward" is the forward pass only, "train" is forward and backward.
    mask: a dense (seqlen_q, seqlen_k) mask shared by all heads, "bool" (True = attend) or "additive" (in `dtype`).
    lengths_q, lengths_k: for varlen, the length of each sequence; seqlen_q and seqlen_k are then the longest.
    cold: keys and values are in no cache when a call starts.

    Raises ValueError, naming the field, if the fields do not describe a call.
    """

    family: str
    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: str
    mode: str = "forward"
    causal: bool = False
    causal_alignment: str = "bottom-right"
    window: tuple[int | None, int | None] | None = None
    mask: str = "none"
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    cold: bool = False

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_sizes()
        if self.lengths_q is not None or self.lengths_k is not None:
            self._check_varlen()

    def _check_choices(self) -> None:
        choices = {"dtype": tuple(DTYPES), "mode": MODES, "causal_alignment": ALIGNMENTS, "mask": MASKS}
        for field, allowed in choices.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {value!r}")

    def _check_sizes(self) -> None:
        for field in ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.heads_q % self.heads_kv:
            raise ValueError(f"heads_q must be a multiple of heads_kv, got {self.heads_q} and {self.heads_kv}")

    def _check_varlen(self) -> None:
        if self.lengths_q is None or self.lengths_k is None:
            raise ValueError("lengths_q and lengths_k go together, got one without the other")
        if self.mask != "none":
            raise ValueError(f"mask must be 'none' when lengths_q and lengths_k are given, got {self.mask!r}")
        for field, lengths, longest in (
            ("lengths_q", self.lengths_q, self.seqlen_q),
            ("lengths_k", self.lengths_k, self.seqlen_k),
        ):
            if len(lengths) != self.batch or min(lengths) < 1 or max(lengths) != longest:
                raise ValueError(f"{field} must hold {self.batch} lengths from 1 to exactly {longest}, got {lengths}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, k, v and out."""
        return DTYPES[self.dtype]

    @property
    def train(self) -> bool:
        """Whether the call includes the backward pass."""
        return self.mode == "train"

    @property
    def varlen(self) -> bool:
        """Whether sequences of different lengths are packed one after the other."""
        return self.lengths_q is not None

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """(seqlen_q, seqlen_k) of every sequence of the batch."""
        if self.lengths_q is None or self.lengths_k is None:
            return [(self.seqlen_q, self.seqlen_k)] * self.batch
        return list(zip(self.lengths_q, self.lengths_k, strict=True))

    @property
    def window_bounds(self) -> tuple[int | None, int | None]:
        """(left, right): keys visible on each side of the diagonal, None = all. Causal means right = 0."""
        left, right = self.window or (None, None)
        return left, 0 if self.causal else right

    @property
    def name(self) -> str:
        """Everything except the family that distinguishes the case. Unique within a family."""
        return " ".join(self._words())

    def _words(self) -> Iterator[str]:
        yield self.mode
        yield f"B{self.batch}"
        yield f"H{self.heads_q}" + (f"/{self.heads_kv}" if self.heads_kv != self.heads_q else "")
        yield self._length_word()
        yield f"D{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        yield self.dtype
        if self.causal:
            yield "causal"
        if self.causal_alignment != "bottom-right":
            yield self.causal_alignment
        if self.window is not None:
            yield "window" + ":".join("" if side is None else str(side) for side in self.window)
        if self.mask != "none":
            yield f"{self.mask}-mask"
        if self.cold:
            yield "cold"

    def _length_word(self) -> str:
        if self.lengths_q is None or self.lengths_k is None:
            return f"S{self.seqlen_q}" + (f"x{self.seqlen_k}" if self.seqlen_k != self.seqlen_q else "")
        word = f"S{min(self.lengths_q)}..{self.seqlen_q}(sum{sum(self.lengths_q)})"
        return word if self.lengths_q == self.lengths_k else f"{word}x{sum(self.lengths_k)}"

    def to_json(self) -> dict[str, Any]:
        """All fields and the name, in types that JSON has."""
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Case:
        """The case that `to_json` described."""
        values: dict[str, Any] = {
            key: tuple(x) if isinstance(x, list) else x for key, x in fields.items() if key != "name"
        }
        return cls(**values)
