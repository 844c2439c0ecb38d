"""Measured ceilings of the machine. The report prints the share of them that a result reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from fastattn.backends.native import cpu as cpu_backend

from .cases import DTYPES
from .machine import last_level_cache
from .timing import Clock, Effort, clock_for, interleave


@dataclass(frozen=True)
class Peaks:
    """Each is the best of several runs. The bandwidths are measured on more memory than the caches hold.

    flops: operations per second of torch.mm, by dtype, on square matrices of matmul_size.
    read_bandwidth: bytes per second of torch.sum, over buffer_bytes.
    copy_bandwidth: bytes read plus bytes written per second by Tensor.copy_.
    quiet: False if other processes had the cores, so that the ceilings are too low.
    multiply_adds: operations per second, by dtype, of the multiply-add instructions of fastattn's CPU kernels, alone
    and on all threads. Empty on other devices.
    """

    flops: dict[str, float]
    matmul_size: int
    read_bandwidth: float
    copy_bandwidth: float
    buffer_bytes: int
    quiet: bool = True
    multiply_adds: dict[str, float] = field(default_factory=dict)

    def flops_ceiling(self, dtype: str) -> float:
        """The rate of multiply-adds alone, if it was measured.

        Otherwise the faster of torch.mm in the dtype and in float32, because a kernel may convert to float32.
        """
        if dtype in self.multiply_adds:
            return self.multiply_adds[dtype]
        return max(self.flops[dtype], 0.0 if dtype == "float64" else self.flops["float32"])


def measure_peaks(
    device: torch.device, dtypes: Iterable[str], *, runs: int = 10, matmul_size: int | None = None
) -> Peaks:
    """Measures the ceilings for these dtypes, in a few seconds on two CPU cores."""
    stopwatch = _Stopwatch(clock_for(device), runs)
    size = matmul_size or (8192 if device.type == "cuda" else 2048)
    wanted = dict.fromkeys([*dtypes, "float32"])
    flops = {dtype: _matmul_flops(size, DTYPES[dtype], device, stopwatch) for dtype in wanted}
    buffer_bytes = _buffer_bytes(device)
    source = torch.ones(buffer_bytes // 4, device=device)
    target = torch.empty_like(source)
    return Peaks(
        flops=flops,
        matmul_size=size,
        read_bandwidth=buffer_bytes / stopwatch.best(source.sum),
        copy_bandwidth=2 * buffer_bytes / stopwatch.best(lambda: target.copy_(source)),
        buffer_bytes=buffer_bytes,
        quiet=stopwatch.quiet,
        multiply_adds={dtype: _multiply_adds(DTYPES[dtype], stopwatch) for dtype in wanted if device.type == "cpu"},
    )


class _Stopwatch:
    """Best times of calls, and whether the machine was quiet for all of them."""

    def __init__(self, clock: Clock, runs: int) -> None:
        self._clock, self._effort = clock, Effort(math.inf, min_rounds=min(3, runs), max_rounds=runs)
        self.quiet = True

    def best(self, call: Callable[[], object]) -> float:
        samples = interleave({"call": call}, self._clock, self._effort)
        self.quiet &= samples.quiet
        return min(samples.seconds["call"])


def _matmul_flops(size: int, dtype: torch.dtype, device: torch.device, stopwatch: _Stopwatch) -> float:
    # A dtype without fast units needs minutes at full size, and its rate does not depend on the size.
    small = torch.randn(256, 256, device=device).to(dtype)
    rate = 2 * 256**3 / stopwatch.best(lambda: small @ small)
    if 2 * size**3 / rate > 2.0:
        return rate
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / stopwatch.best(lambda: a @ b)


def _multiply_adds(dtype: torch.dtype, stopwatch: _Stopwatch) -> float:
    steps = 2_000_000  # about 10 ms
    operations = cpu_backend.multiply_adds(dtype, steps)
    return operations / stopwatch.best(lambda: cpu_backend.multiply_adds(dtype, steps))


def _buffer_bytes(device: torch.device) -> int:
    cache = last_level_cache() if device.type == "cpu" else None
    return max(2**28 if device.type == "cpu" else 2**30, 4 * (cache or 0))
