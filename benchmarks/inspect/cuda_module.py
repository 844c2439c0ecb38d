"""Reads the CUDA module as built: its kernels as PTX and as machine code, and the resources that they use.

The tools for this come with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import sass


class Usage(NamedTuple):
    """Resources of a kernel: registers and bytes of stack per thread, bytes of static shared memory per block."""

    registers: int
    stack: int
    shared: int


def usage(architecture: str) -> dict[str, Usage]:
    """Resources of each kernel that has machine code for an architecture such as "sm_80"."""
    return usage_in(_tool("cuobjdump", "--dump-resource-usage", _module()), architecture)


def usage_in(text: str, architecture: str) -> dict[str, Usage]:
    """The same, from the output of cuobjdump."""
    pattern = re.compile(r"Function (fastattn_\w+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) ")
    units = text.split("arch = ")
    found = [row for unit in units if unit.startswith(f"{architecture}\n") for row in pattern.findall(unit)]
    return {name: Usage(*map(int, numbers)) for name, *numbers in found}


def loops(architecture: str) -> dict[str, list[sass.Loop]]:
    """The loops with tensor-core instructions of each kernel, see `sass.loops`."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        _tool("cuobjdump", "-xelf", architecture, _module(), cwd=folder)
        for file in sorted(Path(folder).glob(f"*.{architecture}.cubin")):
            for name, text in sass.kernels(_tool("nvdisasm", "-c", str(file))).items():
                found[name] = sass.loops(text)
    return found


def ptx() -> Iterator[str]:
    """The module's PTX, one text per unit of compilation."""
    with tempfile.TemporaryDirectory() as folder:
        _tool("cuobjdump", "-xptx", "all", _module(), cwd=folder)
        for file in Path(folder).glob("*.ptx"):
            yield file.read_text()


def _module() -> str:
    from fastattn import _cuda

    return _cuda.__file__


def _tool(name: str, *arguments: str, cwd: str | None = None) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout
