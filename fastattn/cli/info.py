"""`python -m fastattn info`: what this machine has, and which backends run on it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..backends import Backend, dispatch

_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX-512F",
    "avx512bw": "AVX-512BW",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
}
"""Those that kernels care about, by the names under which Linux lists them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to a parser."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 0."""
    report = collect()
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0


def collect() -> dict[str, Any]:
    """Versions, processor, devices and backends; None where the machine does not tell."""
    return {
        "versions": {
            "fastattn": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "triton": _version_of("triton"),
            "cuda": torch.version.cuda,
        },
        "system": platform.platform(),
        "cpu": _cpu(),
        "devices": [_cuda_device(i) for i in range(torch.cuda.device_count())],
        "backends": {backend.name: _why_unavailable(backend) for backend in dispatch.BACKENDS},
    }


def _why_unavailable(backend: Backend) -> str | None:
    try:
        return backend.why_unavailable()
    except ValueError as error:  # a setting in the environment that makes no sense
        return str(error)


def _version_of(module: str) -> str | None:
    """The version of an optional package, or what goes wrong when it is imported."""
    try:
        return str(getattr(importlib.import_module(module), "__version__", "unknown"))
    except ModuleNotFoundError as error:
        return None if error.name == module else f"broken: {error}"
    except Exception as error:  # an installed package that cannot be imported is worth knowing about
        return f"broken: {error}"


def _cpu() -> dict[str, Any]:
    flags = (_cpu_field("flags") or _cpu_field("Features") or "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": _cpu_field("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "instruction_sets": [name for flag, name in _INSTRUCTION_SETS.items() if flag in flags],
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "usable_cores": cores,
        "threads": torch.get_num_threads(),
    }


def _cpu_field(name: str) -> str | None:
    """A field of the first processor, where the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((value.strip() for key, _, value in (x.partition(":") for x in lines) if key.strip() == name), None)


def _cuda_device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": f"cuda:{index}",
        "model": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def _text(report: dict[str, Any]) -> str:
    cpu = report["cpu"]
    lines = [f"{name:<10}{version or 'none'}" for name, version in report["versions"].items()]
    lines += [
        f"{'system':<10}{report['system']}",
        f"{'cpu':<10}{cpu['model']} ({cpu['architecture']}), {cpu['usable_cores']} cores, {cpu['threads']} threads",
        f"{'':<10}{', '.join(cpu['instruction_sets']) or 'instruction sets unknown'}; torch uses "
        f"{cpu['torch_instruction_set']}",
    ]
    for device in report["devices"]:
        lines.append(
            f"{device['name']:<10}{device['model']}, compute capability {device['capability']}, "
            f"{device['multiprocessors']} multiprocessors, {device['memory_bytes'] / 2**30:.1f} GiB"
        )
    lines += ["", "backends, in the order in which they are tried"]
    lines += [f"  {name:<10}{why_not or 'available'}" for name, why_not in report["backends"].items()]
    return "\n".join(lines)
