"""Reads the machine code of a compiled kernel: registers, spills, and the instructions of its main loops.

For NVIDIA it uses the disassembler that comes with Triton, for AMD the assembler text.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

_TENSOR = ("HMMA", "HGMMA", "QGMMA", "UTCHMMA", "IMMA", "DMMA")
_LOCAL = ("LDL", "STL")


class Loop(NamedTuple):
    """An innermost loop with tensor-core instructions: the count of each opcode, suffixes included."""

    opcodes: Counter[str]

    @property
    def instructions(self) -> Counter[str]:
        """By name, without suffixes."""
        found: Counter[str] = Counter()
        for opcode, count in self.opcodes.items():
            found[opcode.split(".")[0]] += count
        return found

    @property
    def total(self) -> int:
        """All instructions."""
        return sum(self.opcodes.values())

    @property
    def spills(self) -> int:
        """Loads and stores of spilled registers."""
        return sum(self.instructions[name] for name in _LOCAL)


class Code(NamedTuple):
    """registers: per thread. stack: bytes per thread, for spills. loops: the shortest first."""

    registers: int
    stack: int
    loops: list[Loop]


def disassemble(cubin: bytes, tools: Path) -> Code:
    """Disassembles a kernel for NVIDIA. tools: the folder of nvdisasm and cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        text = _output(tools / "nvdisasm", "-c", file.name)
    registers, stack = (_number(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
    return Code(registers, stack, loops(text))


def disassemble_amd(assembly: str) -> Code:
    """The same for AMD's assembler text, without loops."""
    return Code(
        _number(r"\.vgpr_count:\s+(\d+)", assembly), _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly), []
    )


def kernels(text: str) -> dict[str, str]:
    """The output of nvdisasm for several kernels, by their names."""
    parts = re.split(r"(?m)^\s*\.section\s+\.text\.(\w+).*$", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def loops(text: str) -> list[Loop]:
    """Innermost loops with tensor-core instructions in the output of nvdisasm for one kernel, the shortest first."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            opcode = instruction[1]
            target = re.search(r"`\((\.L_\w+)\)", instruction[2])
            if opcode.split(".")[0] == "BRA" and target and target[1] in labels:
                spans.append((labels[target[1]], len(opcodes)))
            opcodes.append(opcode)
    with_tensor = [(a, b) for a, b in spans if any(x.split(".")[0] in _TENSOR for x in opcodes[a : b + 1])]
    inner = [(a, b) for a, b in with_tensor if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in with_tensor)]
    return sorted((Loop(Counter(opcodes[a : b + 1])) for a, b in inner), key=lambda loop: loop.total)


def _output(*command: object) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0
