"""A model of what bounds a loop on a GPU: the cycles in which each pipe of a multiprocessor is busy.

It ignores latencies, caches and dependences. The largest number is therefore a lower bound of the time.
"""

from __future__ import annotations

from typing import NamedTuple

from .sass import Loop

_FP32 = ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "FSET")
_SHARED = ("LDS", "LDSM", "STS", "LDGSTS")
_PRODUCT = 16 * 8 * 16  # multiply-adds of one m16n8k16


class Rates(NamedTuple):
    """Throughput per clock and multiprocessor.

    tensor: multiply-adds of half precision on tensor cores.
    fp32, mufu: lanes of float32 and of special functions.
    shared: words of 4 bytes of shared memory.
    issue: instructions issued by warps.
    """

    tensor: float
    fp32: int
    mufu: int
    shared: int
    issue: int


RATES = {
    "A100": Rates(1024, 64, 16, 32, 4),
    "H100": Rates(0.6 * 2048, 128, 16, 32, 4),  # mma.sync reaches 60% of what wgmma does
    "T4": Rates(512, 64, 16, 32, 4),
}
"""Source: NVIDIA's architecture papers, and the throughput table of the CUDA programming guide."""


class Work(NamedTuple):
    """What a loop executes per m16n8k16 of one warp: instructions by kind, and wavefronts of shared memory."""

    instructions: float
    fp32: float
    mufu: float
    ldsm: float
    lds: float
    wavefronts: float


def work(loop: Loop) -> Work:
    """Counts a loop's instructions. Two m16n8k8 (compute capability 7.5) count as one m16n8k16."""
    names, unit = loop.instructions, products(loop)
    fp32 = sum(names[name] for name in _FP32)
    wavefronts = sum(count * _wavefronts(opcode) for opcode, count in loop.opcodes.items())
    counts = (loop.total, fp32, names["MUFU"], names["LDSM"], names["LDS"], wavefronts)
    return Work(*(count / unit for count in counts))


def products(loop: Loop) -> float:
    """The m16n8k16 of half precision that a warp computes in one iteration."""
    sizes = {"16816": 1.0, "1688": 0.5}
    found = [(opcode.split("."), count) for opcode, count in loop.opcodes.items() if opcode.startswith("HMMA")]
    return sum(sizes[parts[1]] * count for parts, count in found)


def _wavefronts(opcode: str) -> int:
    """Wavefronts of one instruction of a warp, without bank conflicts and without words that lanes share."""
    name, *suffixes = opcode.split(".")
    if name not in _SHARED:
        return 0
    if name == "LDSM":
        return int(suffixes[-1]) if suffixes[-1] in ("2", "4") else 1
    return 4 if "128" in suffixes else 2 if "64" in suffixes else 1


def cycles(of: Work, rates: Rates) -> dict[str, float]:
    """Cycles per m16n8k16 of one warp in which each pipe of a multiprocessor is busy."""
    return {
        "tensor": _PRODUCT / rates.tensor,
        "FP32": 32 * of.fp32 / rates.fp32,
        "MUFU": 32 * of.mufu / rates.mufu,
        "shared": 32 * of.wavefronts / rates.shared,
        "issue": of.instructions / rates.issue,
    }
