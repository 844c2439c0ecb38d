"""Philox4x32-10, the counter-based random generator behind dropout.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). A word is a pure
function of (key, counter), so any backend makes the same dropout mask in any order and never stores it.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
    """The four 32-bit words for a counter and a key.

    counter: four int64 tensors of one broadcastable shape, values in [0, 2^32). key: two integers in
    [0, 2^32), or int64 tensors without dimensions.
    Returns four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product of two 32-bit words wraps around in int64, but keeps all of its 64 bits.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
    return c0, c1, c2, c3


def dropout_keep(
    seed: int | Tensor,
    threshold: int,
    batches: range,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    *,
    device: torch.device,
    q_offset: Tensor | None = None,
) -> Tensor:
    """Which probabilities survive dropout: bool (len(batches), heads, seqlen_q, seqlen_k).

    Element (b, h, i, j) is kept iff word j mod 4 of Philox(key = seed, counter = (j div 4, i, b * heads + h, 0)) is at
    least `threshold` = floor(p * 2^32). q_offset, (len(batches),): what is added to i in each sequence.
    """
    j = torch.arange(-(-seqlen_k // 4), device=device)
    i = torch.arange(seqlen_q, device=device)[:, None]
    if q_offset is not None:
        i = (i + q_offset.to(torch.int64)[:, None, None, None]) & _MASK
    row = torch.arange(batches.start * heads, batches.stop * heads, device=device).view(len(batches), heads, 1, 1)
    words = philox4x32((j, i, row, torch.zeros_like(j)), (seed & _MASK, seed >> 32 & _MASK))
    keep = torch.stack(torch.broadcast_tensors(*words), dim=-1) >= threshold
    return keep.flatten(-2)[..., :seqlen_k]


def draw_seed() -> Tensor:
    """A new seed from torch's default CPU generator, so that torch.manual_seed reproduces a run."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")


def seed_tensor(seed: int | Tensor | None) -> Tensor:
    """The `seed` argument of a call as an int64 tensor without dimensions; None draws one.

    Raises TypeError for anything but an integer or an int64 tensor, ValueError for a value outside [0, 2^63).
    """
    if seed is None:
        return draw_seed()
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor, got a tensor of {seed.dtype}")
        if seed.ndim != 0:
            raise ValueError(f"seed must be a single number, got a tensor of shape {tuple(seed.shape)}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed must be an int or an int64 tensor, got {type(seed).__name__} {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    return torch.full((), seed, dtype=torch.int64, device="cpu")
