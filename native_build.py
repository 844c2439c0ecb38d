"""How the native modules are compiled: sources and flags as data, for setup.py and for the tests of the C++ code.

The CPU kernels are one source, compiled once per instruction set; the module picks one when it is loaded. Nothing of
torch is compiled against or linked: one build works with every version of it.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

# -fno-math-errno and -fno-trapping-math change no result: NaN, inf and signed zero keep their meaning. Products are
# fused with sums only where the code says fma: see exponential() in forward.h. GCC 12 warns of uninitialised values
# inside its own AVX-512 header, and its vectoriser reads past the end of arrays with gaps, so it stays off where the
# code does not use vector types of its own.
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
KERNEL = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
_AVX512 = ["-DFASTATTN_SIMD=2", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
INSTRUCTION_SETS = {"scalar": ["-DFASTATTN_SIMD=0", "-fno-tree-vectorize", "-fno-tree-slp-vectorize"]}
if X86:
    INSTRUCTION_SETS |= {
        "avx2": ["-DFASTATTN_SIMD=1", "-mavx2", "-mfma", "-mf16c"],
        "avx512": _AVX512,
        "avx512bf16": [*_AVX512, "-mavx512bf16"],
    }


def kernel_flags(instruction_set: str) -> list[str]:
    """Flags, but for optimisation, that compile csrc/cpu/kernels.cpp for an instruction set."""
    names = [f"-DFASTATTN_ISA={instruction_set}", f'-DFASTATTN_ISA_NAME="{instruction_set}"']
    return [*COMMON, *KERNEL, *names, *INSTRUCTION_SETS[instruction_set]]


def core_objects() -> dict[str, tuple[str, list[str]]]:
    """Object name -> (source, flags) of the CPU core, without the Python module around it."""
    objects = {f"kernels_{name}": ("csrc/cpu/kernels.cpp", [*kernel_flags(name), "-O3"]) for name in INSTRUCTION_SETS}
    objects["core"] = ("csrc/cpu/core.cpp", [*COMMON, "-O2", *(["-DFASTATTN_X86"] if X86 else [])])
    objects["parallel"] = ("csrc/cpu/parallel.cpp", [*COMMON, "-O2"])
    return objects


def libraries() -> list[str]:
    """What a module or program made of these objects is linked with."""
    return ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-ldl", "-lpthread"]


def compiler() -> str:
    """The C++ compiler: $CXX, or else the first of c++, g++ and clang++. Raises RuntimeError if there is none."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise RuntimeError("fastattn needs a C++17 compiler: none found as $CXX, c++, g++ or clang++")
    return found
