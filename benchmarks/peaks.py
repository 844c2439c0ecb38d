"""Ceilings of the machine, as measured; the report prints what share of them a figure reaches."""

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
    """flops: operations per second of torch.mm by dtype. read_bandwidth: bytes per second of torch.sum.

    multiply_adds: operations per second, by dtype, of the instructions that fastattn's CPU kernels multiply with, and
    of nothing else, on all threads; empty on other devices.
    copy_bandwidth: bytes read plus written per second by Tensor.copy_. Each is the best of several runs, with
    operands of the sizes given; the bandwidths are over more memory than the caches hold.
    quiet: False if other processes had the cores meanwhile, so that the ceilings are too low.
    """

    flops: dict[str, float]
    matmul_size: int
    read_bandwidth: float
    copy_bandwidth: float
    buffer_bytes: int
    quiet: bool = True
    multiply_adds: dict[str, float] = field(default_factory=dict)

    def flops_ceiling(self, dtype: str) -> float:
        """What multiply-adds alone reach, where it was measured.

        Else the faster of torch.mm in the dtype and in float32, as a kernel may always convert to float32.
        """
        if dtype in self.multiply_adds:
            return self.multiply_adds[dtype]
        return max(self.flops[dtype], 0.0 if dtype == "float64" else self.flops["float32"])


def measure_peaks(
    device: torch.device, dtypes: Iterable[str], *, runs: int = 10, matmul_size: int | None = None
) -> Peaks:
    """Measures the ceilings for these dtypes; takes a few seconds on two CPU cores."""
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
    # A dtype without fast units would take minutes at full size, and its rate does not depend on it.
    small = torch.randn(256, 256, device=device).to(dtype)
    rate = 2 * 256**3 / stopwatch.best(lambda: small @ small)
    if 2 * size**3 / rate > 2.0:
        return rate
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / stopwatch.best(lambda: a @ b)


def _multiply_adds(dtype: torch.dtype, stopwatch: _Stopwatch) -> float:
    steps = 2_000_000  # some 10 ms
    operations = cpu_backend.multiply_adds(dtype, steps)
    return operations / stopwatch.best(lambda: cpu_backend.multiply_adds(dtype, steps))


def _buffer_bytes(device: torch.device) -> int:
    cache = last_level_cache() if device.type == "cpu" else None
    return max(2**28 if device.type == "cpu" else 2**30, 4 * (cache or 0))
