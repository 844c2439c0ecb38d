"""The machine and the software: the header of every report."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.backends.native import cpu as cpu_backend


def header(device: torch.device) -> dict[str, Any]:
    """Everything needed to judge and repeat a measurement. None for what the machine does not report."""
    commit, dirty = git_state(Path(__file__))
    gpu = None if device.type != "cuda" else torch.cuda.get_device_properties(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": str(device),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "cpu_isa": torch.backends.cpu.get_cpu_capability(),
        "kernels": cpu_backend.instruction_set(),
        "last_level_cache_bytes": last_level_cache(),
        "memory_bytes": memory_field("MemTotal"),
        "gpu": None if gpu is None else gpu.name,
        "gpu_memory_bytes": None if gpu is None else gpu.total_memory,
        "cuda": torch.version.cuda,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastattn": fastattn.__version__,
        "commit": commit,
        "dirty": dirty,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def cpu_model() -> str | None:
    """The name of the processor as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def usable_cores() -> int | None:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def last_level_cache() -> int | None:
    """Bytes of the largest cache that core 0 uses, if the system reports it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:])
        sizes.append(int(text[:-1]) * unit if unit else int(text))
    return max(sizes, default=None)


def memory_field(name: str) -> int | None:
    """A field of /proc/meminfo in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(values[0]) * 1024 if values else None


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return memory_field("MemAvailable")


def git_state(file: Path) -> tuple[str | None, bool | None]:
    """(commit, dirty) of the checkout that tracks the file, (None, None) for an installed copy.

    The file must be tracked, because an installed copy may be in a virtual environment inside another checkout.
    """
    folder = file.resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", file.name) is None:
        return None, None
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return _git(folder, "rev-parse", "HEAD"), None if status is None else bool(status)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
