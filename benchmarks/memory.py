"""Peak memory of one call, beyond the memory in use before it. The outputs count."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

METHODS = {
    "cuda": "torch.cuda.max_memory_allocated, above the level before the call",
    "cpu": "peak resident size (VmHWM), above the level before the call, free heap returned first",
}

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def method(device: torch.device) -> str | None:
    """How the peak is measured on that device. None if this machine offers no way."""
    if device.type == "cpu" and not _can_reset_peak():
        return None
    return METHODS.get(device.type)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Runs the call once and returns its peak in bytes. None if this machine has no way to measure it.

    On the CPU all memory counts that becomes resident, including a library's scratch memory, to within a few hundred
    KiB. Memory that a library keeps from call to call does not count.
    """
    if device.type == "cuda":
        return _cuda_peak(call, device)
    if device.type == "cpu" and _can_reset_peak():
        return _resident_peak(call)
    return None


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def _resident_peak(call: Callable[[], object]) -> int:
    _return_free_heap()
    _CLEAR_REFS.write_text("5")  # resets VmHWM to the current resident size
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _can_reset_peak() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _return_free_heap() -> None:
    """Returns freed pages to the system, so that reusing them counts. Only glibc has the function."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no field {field}")
    return int(found.group(1)) * 1024
