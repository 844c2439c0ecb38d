"""The marks of the CUDA kernels: limits for compute capability 8.0 in bfloat16. None of them is a time.

The limits of whole kernels are the counts of FlashAttention-2 for the same call in the same simulator: one head, 1024
queries and keys.
"""

from __future__ import annotations

from typing import NamedTuple

MAIN_LOOP = {
    ("forward", 64): 3.9,
    ("forward", 128): 2.8,
    ("bwd_dq", 64): 3.0,
    ("bwd_dkdv", 64): 3.1,
}
"""Upper limits of SASS instructions per m16n8k16 in the loop over full blocks."""

BETTER_MAIN_LOOP = {("forward", 64): 3.5, ("forward", 128): 2.7}
"""Goals below the limits."""


class Counts(NamedTuple):
    """Counts over a whole kernel.

    products: m16n8k16 of warps (m16n8k8 on compute capability 7.5).
    instructions: PTX instructions of warps per product. A multiplication and an addition that fuse count as one.
    without_moves: the same without `mov`. Machine code has few of them.
    mufu: special-function instructions, such as exponentials, per visible score.
    wavefronts: of shared memory, per product.
    """

    products: int
    instructions: float
    without_moves: float
    mufu: float
    wavefronts: float
    conflicts: int
    global_bytes: int


FLASH_ATTENTION_2 = {
    (64, False): {"instructions": 4.57, "mufu": 1.035, "wavefronts": 1.42, "global_bytes": 2363392},
    (64, True): {"instructions": 5.05, "mufu": 1.168, "wavefronts": 1.46, "global_bytes": 1445888},
    (128, False): {"instructions": 3.62, "mufu": 1.066, "wavefronts": 1.55, "global_bytes": 4722688},
    (128, True): {"instructions": 3.84, "mufu": 1.203, "wavefronts": 1.58, "global_bytes": 2887680},
}
"""Counts of its forward pass by head_dim and causal."""


class Mark(NamedTuple):
    """A figure and its upper limit. wish: the limit is a goal, and missing it is no error."""

    title: str
    figure: float
    limit: float
    wish: bool = False

    @property
    def met(self) -> bool:
        """Decided on the figure before rounding."""
        return self.figure <= self.limit

    def __str__(self) -> str:
        verdict = "met" if self.met else "not met"
        return f"{self.title:62} {_number(self.figure):>9}  {'hoped' if self.wish else 'at most':7} " + (
            f"{_number(self.limit):>9}  {verdict}"
        )


def _number(x: float) -> str:
    return str(x) if isinstance(x, int) else f"{x:.3f}"


def of_loop(kernel: str, head_dim: int, instructions: float) -> list[Mark]:
    """Marks of a main loop: instructions per m16n8k16."""
    title, key = f"{kernel} d{head_dim}: SASS instructions per HMMA, main loop", (kernel, head_dim)
    found = [Mark(title, instructions, MAIN_LOOP[key])] if key in MAIN_LOOP else []
    return found + ([Mark(title, instructions, BETTER_MAIN_LOOP[key], True)] if key in BETTER_MAIN_LOOP else [])


def of_whole(kernel: str, head_dim: int, causal: bool, counts: Counts) -> list[Mark]:
    """Marks of the counts over a whole kernel."""
    call = f"{kernel} d{head_dim} {'causal' if causal else 'full'}"
    found = [Mark(f"{call}: bank conflicts", counts.conflicts, 0)]
    if kernel == "forward":
        names = {
            "instructions": "PTX instructions per mma, whole kernel",
            "mufu": "MUFU per score",
            "wavefronts": "shared wavefronts per mma",
            "global_bytes": "global bytes",
        }
        limits = FLASH_ATTENTION_2[head_dim, causal]
        found += [Mark(f"{call}: {name}", getattr(counts, field), limits[field]) for field, name in names.items()]
    return found
