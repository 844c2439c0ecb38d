"""The suites: cases as data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .cases import Case

TRAINING_DTYPES = ("float32", "bfloat16", "float16")


def dense(
    family: str,
    *,
    seqlen: int,
    dtype: str,
    batch: int = 1,
    heads: int = 8,
    heads_kv: int | None = None,
    seqlen_k: int | None = None,
    head_dim: int = 64,
    **options: Any,
) -> Case:
    """A case whose sequences all have one length. heads_kv and seqlen_k default to heads and seqlen."""
    return Case(
        family,
        batch,
        heads,
        heads if heads_kv is None else heads_kv,
        seqlen,
        seqlen if seqlen_k is None else seqlen_k,
        head_dim,
        head_dim,
        dtype,
        **options,
    )


def ragged(
    family: str, lengths: Iterable[int], *, dtype: str, heads: int = 8, head_dim: int = 64, **options: Any
) -> Case:
    """A varlen case with keys as long as the queries."""
    lengths = tuple(lengths)
    longest = max(lengths)
    sizes = (len(lengths), heads, heads, longest, longest, head_dim, head_dim)
    return Case(family, *sizes, dtype, lengths_q=lengths, lengths_k=lengths, **options)


def _square(mode: str) -> list[Case]:
    return [
        dense(
            f"{mode}-{'causal' if causal else 'full'}",
            seqlen=seqlen,
            head_dim=head_dim,
            dtype=dtype,
            mode=mode,
            causal=causal,
        )
        for dtype in TRAINING_DTYPES
        for causal in (False, True)
        for head_dim in (64, 128)
        for seqlen in (1024, 2048)
    ]


# Lengths as a tokenizer returns them: most short, a few long.
RAGGED_LENGTHS = (37, 512, 129, 64, 300, 1024, 17, 85)


def _gqa() -> list[Case]:
    llama = {"heads": 32, "heads_kv": 8, "head_dim": 128}
    return [
        dense("gqa-prefill", seqlen=512, dtype=dtype, causal=True, mode=mode, **llama)
        for mode in ("forward", "train")
        for dtype in TRAINING_DTYPES
    ]


def _decode() -> list[Case]:
    step: dict[str, Any] = {"seqlen": 1, "seqlen_k": 8192, "head_dim": 128, "cold": True}
    grouped = [dense("gqa-decode", dtype=dtype, heads=32, heads_kv=8, **step) for dtype in TRAINING_DTYPES]
    return grouped + [dense("decode", dtype=dtype, heads=8, **step) for dtype in TRAINING_DTYPES]


def _window() -> list[Case]:
    return [
        dense("window", seqlen=4096, dtype=dtype, mode=mode, causal=True, window=(255, 0))
        for mode in ("forward", "train")
        for dtype in TRAINING_DTYPES
    ]


def _mask() -> list[Case]:
    return [
        dense("mask", seqlen=1024, dtype=dtype, mode=mode, mask=mask)
        for mode in ("forward", "train")
        for mask in ("additive", "bool")
        for dtype in TRAINING_DTYPES
    ]


def _varlen() -> list[Case]:
    return [
        ragged("varlen", RAGGED_LENGTHS, dtype=dtype, mode=mode, causal=causal)
        for mode in ("forward", "train")
        for causal in (False, True)
        for dtype in TRAINING_DTYPES
    ]


def _small() -> list[Case]:
    return [
        dense("small", seqlen=seqlen, dtype=dtype, mode=mode)
        for mode in ("forward", "train")
        for dtype in TRAINING_DTYPES
        for seqlen in (16, 32, 64, 128, 256)
    ]


def _sweep() -> list[Case]:
    lengths = [
        dense("sweep-seqlen", seqlen=seqlen, dtype=dtype, mode=mode, causal=True)
        for mode in ("forward", "train")
        for dtype in ("float32", "bfloat16")
        for seqlen in (64, 128, 256, 512, 1024, 2048, 4096)
    ]
    head_dims = [
        dense("sweep-head-dim", seqlen=1024, head_dim=head_dim, dtype=dtype, mode=mode)
        for mode in ("forward", "train")
        for dtype in ("float32", "bfloat16")
        for head_dim in (32, 40, 64, 80, 96, 128, 160, 192, 256)
    ]
    return lengths + head_dims


# (mode, dtype, batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, causal)
# Every size, dtype, mode and kind of grouping occurs several times, in different combinations.
# torch's own attention supports each row.
_SWEEP60 = (
    ("forward", "float32", 1, 8, 8, 1, 1, 64, False),
    ("forward", "float32", 1, 1, 1, 16, 16, 32, False),
    ("forward", "float32", 8, 12, 12, 32, 32, 64, False),
    ("forward", "float32", 1, 1, 1, 4096, 4096, 64, False),
    ("forward", "float32", 1, 2, 2, 4096, 4096, 128, True),
    ("forward", "float32", 2, 16, 16, 512, 512, 80, False),
    ("forward", "float32", 4, 12, 12, 197, 197, 64, False),
    ("forward", "float32", 8, 6, 6, 257, 257, 64, False),
    ("forward", "float32", 1, 32, 8, 256, 256, 128, True),
    ("forward", "float32", 1, 8, 1, 1024, 1024, 96, True),
    ("forward", "float32", 1, 8, 8, 1, 4096, 64, False),
    ("forward", "float32", 8, 32, 8, 1, 1024, 128, False),
    ("forward", "float32", 2, 8, 8, 77, 1024, 64, False),
    ("forward", "float32", 1, 4, 4, 1024, 1024, 256, False),
    ("forward", "float32", 1, 4, 4, 1000, 1000, 40, True),
    ("forward", "bfloat16", 1, 8, 8, 1, 1, 64, False),
    ("forward", "bfloat16", 1, 32, 32, 16, 16, 128, True),
    ("forward", "bfloat16", 8, 16, 16, 64, 64, 64, False),
    ("forward", "bfloat16", 1, 1, 1, 2048, 2048, 64, True),
    ("forward", "bfloat16", 1, 4, 4, 4096, 4096, 64, True),
    ("forward", "bfloat16", 4, 8, 8, 512, 512, 32, True),
    ("forward", "bfloat16", 1, 16, 2, 777, 777, 128, True),
    ("forward", "bfloat16", 1, 32, 4, 1, 4096, 128, False),
    ("forward", "bfloat16", 8, 8, 8, 1, 512, 64, False),
    ("forward", "bfloat16", 2, 12, 12, 384, 384, 64, False),
    ("forward", "bfloat16", 1, 4, 4, 1024, 1024, 192, True),
    ("forward", "bfloat16", 1, 8, 8, 1024, 77, 160, False),
    ("forward", "bfloat16", 1, 16, 16, 128, 2048, 256, False),
    ("forward", "float16", 1, 8, 8, 1, 16, 64, False),
    ("forward", "float16", 2, 8, 8, 64, 64, 64, True),
    ("forward", "float16", 1, 8, 8, 512, 512, 64, False),
    ("forward", "float16", 1, 2, 2, 2048, 2048, 128, True),
    ("forward", "float16", 4, 8, 2, 256, 256, 96, True),
    ("forward", "float16", 1, 32, 8, 1, 2048, 128, False),
    ("forward", "float16", 8, 8, 8, 129, 129, 80, False),
    ("forward", "float16", 1, 4, 4, 1024, 1024, 256, False),
    ("train", "float32", 1, 8, 8, 16, 16, 64, False),
    ("train", "float32", 8, 8, 8, 64, 64, 64, True),
    ("train", "float32", 4, 12, 12, 197, 197, 64, False),
    ("train", "float32", 1, 1, 1, 2048, 2048, 64, False),
    ("train", "float32", 1, 2, 2, 4096, 4096, 64, True),
    ("train", "float32", 2, 8, 8, 512, 512, 128, True),
    ("train", "float32", 1, 8, 2, 512, 512, 128, True),
    ("train", "float32", 1, 4, 4, 777, 777, 40, False),
    ("train", "float32", 1, 4, 4, 512, 512, 256, False),
    ("train", "float32", 2, 8, 8, 77, 512, 64, False),
    ("train", "bfloat16", 1, 8, 8, 32, 32, 64, False),
    ("train", "bfloat16", 8, 12, 12, 128, 128, 64, True),
    ("train", "bfloat16", 1, 32, 8, 256, 256, 128, True),
    ("train", "bfloat16", 1, 1, 1, 4096, 4096, 128, True),
    ("train", "bfloat16", 4, 8, 8, 512, 512, 32, False),
    ("train", "bfloat16", 1, 8, 8, 1024, 1024, 96, True),
    ("train", "bfloat16", 1, 8, 1, 513, 513, 64, True),
    ("train", "bfloat16", 1, 4, 4, 1024, 256, 192, False),
    ("train", "float16", 1, 8, 8, 64, 64, 64, False),
    ("train", "float16", 2, 8, 8, 256, 256, 64, True),
    ("train", "float16", 1, 4, 4, 512, 512, 128, False),
    ("train", "float16", 1, 8, 2, 384, 384, 80, True),
    ("train", "float16", 1, 2, 2, 1024, 1024, 64, True),
    ("train", "float16", 4, 4, 4, 129, 129, 32, False),
    ("train", "float16", 1, 2, 2, 512, 512, 256, False),
    ("train", "float16", 1, 1, 1, 1, 2048, 128, False),
)


def _sweep60() -> list[Case]:
    return [
        Case("sweep60", b, hq, hkv, sq, sk, d, d, dtype, mode=mode, causal=causal)
        for mode, dtype, b, hq, hkv, sq, sk, d, causal in _SWEEP60
    ]


def _quick() -> list[Case]:
    """One or two of every family, and a sweep over the length for the plot."""
    sweep = [dense("sweep-seqlen", seqlen=s, dtype="float32", causal=True) for s in (64, 128, 256, 512, 1024)]
    return [
        *sweep,
        dense("forward-full", seqlen=512, dtype="float32"),
        dense("forward-full", seqlen=512, dtype="bfloat16"),
        dense("train-causal", seqlen=512, dtype="float32", mode="train", causal=True),
        dense("train-causal", seqlen=512, dtype="bfloat16", mode="train", causal=True),
        dense("gqa-prefill", seqlen=256, dtype="float32", heads=16, heads_kv=4, head_dim=128, causal=True),
        dense(
            "gqa-decode",
            seqlen=1,
            seqlen_k=4096,
            dtype="bfloat16",
            heads=16,
            heads_kv=4,
            head_dim=128,
            cold=True,
        ),
        dense("window", seqlen=1024, dtype="float32", causal=True, window=(127, 0)),
        dense("mask", seqlen=512, dtype="float32", mask="additive"),
        ragged("varlen", (37, 256, 129, 64), dtype="float32", causal=True),
    ]


def _gpu() -> list[Case]:
    """Cases for GPU kernels: 16384 tokens for every sequence length, 2048 elements per token."""
    square = [
        dense(
            f"gpu-{mode}-{'causal' if causal else 'full'}",
            seqlen=seqlen,
            batch=16384 // seqlen,
            heads=2048 // head_dim,
            head_dim=head_dim,
            dtype=dtype,
            mode=mode,
            causal=causal,
        )
        for mode in ("forward", "train")
        for dtype in ("bfloat16", "float16")
        for causal in (False, True)
        for head_dim in (64, 128)
        for seqlen in (512, 2048, 8192)
    ]
    others = [
        case
        for mode in ("forward", "train")
        for case in (
            dense(
                "gpu-window",
                seqlen=8192,
                dtype="bfloat16",
                heads=16,
                head_dim=128,
                causal=True,
                window=(511, 0),
                mode=mode,
            ),
            dense("gpu-gqa", seqlen=4096, dtype="bfloat16", heads=32, heads_kv=8, head_dim=128, causal=True, mode=mode),
            ragged("gpu-varlen", RAGGED_LENGTHS * 8, dtype="bfloat16", heads=16, head_dim=128, causal=True, mode=mode),
            dense("gpu-head-dim", seqlen=4096, dtype="bfloat16", heads=8, head_dim=256, causal=True, mode=mode),
        )
    ]
    return square + others


def _build() -> dict[str, list[Case]]:
    suites = {
        "quick": _quick(),
        "forward": _square("forward"),
        "train": _square("train"),
        "gqa": _gqa(),
        "decode": _decode(),
        "window": _window(),
        "mask": _mask(),
        "varlen": _varlen(),
        "small": _small(),
        "sweep": _sweep(),
        "sweep60": _sweep60(),
        "gpu": _gpu(),
    }
    parts = [cases for name, cases in suites.items() if name not in ("quick", "sweep60", "gpu")]
    return suites | {"all": [case for cases in parts for case in cases]}


SUITES = _build()
DEFAULT_SUITE = "quick"
