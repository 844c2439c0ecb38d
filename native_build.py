"""How the native modules are compiled: sources and flags as data, for setup.py and for the tests of the C++ code.

The CPU kernels are one source, compiled once per instruction set; the module picks one when it is loaded. The CUDA
kernels are compiled once per head dimension, each for several GPUs; the driver picks. Nothing of torch is compiled
against or linked: one build works with every version of it.

FASTATTN_CUDA=0 leaves the CUDA module out, 1 insists on it; otherwise it is built if there is an nvcc.
FASTATTN_CUDA_ARCHITECTURES names the GPUs that it gets machine code for, as in "80,90"; others compile its PTX when
they first need it. Fewer of them build sooner.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

# -fno-math-errno and -fno-trapping-math change no result: NaN, inf and signed zero keep their meaning. Products are
# fused with sums only where the code says fma: see log_sum() in csrc/cpu/tile/lse.h. GCC 12 warns of uninitialised
# values inside its own AVX-512 header. Its vectoriser reads past the end of arrays with gaps, so it stays off where the
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


class Object(NamedTuple):
    """An object file: `compiler` is a command, `source` a path from the root of the project."""

    source: str
    compiler: str
    flags: list[str]


class Module(NamedTuple):
    """A Python module: its objects by name, the command that links them, and what with."""

    objects: dict[str, Object]
    linker: list[str]
    libraries: list[str]


def modules() -> dict[str, Callable[[], Module]]:
    """What this machine builds, by name."""
    nvcc = find_nvcc()
    made: dict[str, Callable[[], Module]] = {"fastattn._cpu": cpu_module}
    if nvcc is not None:
        made["fastattn._cuda"] = lambda: cuda_module(nvcc)
    return made


def _bindings(source: str, flags: list[str]) -> Object:
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    return Object(source, compiler(), [*COMMON, "-O2", *includes, *flags])


# ------------------------------------------------------------------------------------------------------------------ CPU


def kernel_flags(instruction_set: str) -> list[str]:
    """Flags, except for optimisation, that compile csrc/cpu/kernels/table.cpp for an instruction set."""
    names = [f"-DFASTATTN_ISA={instruction_set}", f'-DFASTATTN_ISA_NAME="{instruction_set}"']
    return [*COMMON, *KERNEL, *names, *INSTRUCTION_SETS[instruction_set]]


def cpu_module() -> Module:
    """The module fastattn._cpu."""
    objects = {**core_objects(), "bindings": _bindings("csrc/call/bindings_cpu.cpp", [])}
    return Module(objects, [compiler(), "-shared"], libraries())


def core_objects() -> dict[str, Object]:
    """The CPU core, without the Python module around it."""
    cxx = compiler()
    objects = {
        f"kernels_{name}": Object("csrc/cpu/kernels/table.cpp", cxx, [*kernel_flags(name), "-O3"])
        for name in INSTRUCTION_SETS
    }
    for name in ("run", "plan", "instruction_sets", "parallel", "workspace"):
        objects[name] = Object(f"csrc/cpu/{name}.cpp", cxx, [*COMMON, "-O2", *(["-DFASTATTN_X86"] if X86 else [])])
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


# ----------------------------------------------------------------------------------------------------------------- CUDA


def find_nvcc() -> Path | None:
    """The CUDA compiler: of CUDA_HOME, of the PATH, or of pip packages (see the README).

    None if there is none, or FASTATTN_CUDA=0. Raises RuntimeError if there is none and FASTATTN_CUDA=1.
    """
    wanted = os.environ.get("FASTATTN_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise RuntimeError(f"FASTATTN_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    candidates = []
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home) / "bin" / "nvcc")
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations or () if packages else ():
        candidates += sorted(Path(folder).glob("*/bin/nvcc"), reverse=True)
    found = next((nvcc for nvcc in candidates if nvcc.exists()), None)
    if found is None and wanted == "1":
        raise RuntimeError("FASTATTN_CUDA=1, but there is no nvcc in CUDA_HOME, on the PATH or among the pip packages")
    return found


class CudaFolder(NamedTuple):
    """The kernels in a folder of csrc/cuda, for GPUs of a range of compute capabilities, times 10.

    ptx: those that it is compiled for; the first is the least, and machine code is made from the nearest below. A later
    one is left out where no GPU asks for it. end: where the range ends. families: a source each, and the head
    dimensions that it is compiled for; none means once.
    """

    name: str
    ptx: tuple[int, ...]
    end: int
    families: dict[str, tuple[int, ...]]


CUDA_ARCHITECTURES = ("75", "80", "90", "100", "120")
HEAD_DIMS_75 = (64, 128)
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
CUDA_FOLDERS = (
    CudaFolder("smxx", (75,), 1000, {"bwd_preprocess": ()}),
    CudaFolder("sm75", (75,), 80, dict.fromkeys(("forward", "bwd_dq", "bwd_dkdv"), HEAD_DIMS_75)),
    CudaFolder(
        "sm80",
        (80, 90),  # 90: fewer registers, see ArchTraits in csrc/cuda/common/arch.h
        1000,
        {**dict.fromkeys(("forward", "bwd_dq", "bwd_dkdv", "decode"), HEAD_DIMS), "append_kv": (), "combine": ()},
    ),
)


def cuda_architectures(nvcc: Path) -> list[str]:
    """The GPUs to compile for: those asked for, or else those of CUDA_ARCHITECTURES that this nvcc knows."""
    listed = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"sm_(\d+)", listed))
    asked = os.environ.get("FASTATTN_CUDA_ARCHITECTURES")
    if not asked:
        return [name for name in CUDA_ARCHITECTURES if name in known]
    names = asked.replace(" ", "").split(",")
    for name in names:
        if name not in known or int(name) < 75:
            possible = ", ".join(sorted((n for n in known if int(n) >= 75), key=int))
            raise RuntimeError(f"FASTATTN_CUDA_ARCHITECTURES must name some of {possible}, got {name!r}")
    return names


def generate_code(virtual: str, real: list[str]) -> list[str]:
    """Flags for one PTX, and machine code made of it: nvcc optimises once, and assembles for each GPU."""
    codes = ",".join([*(f"sm_{name}" for name in real), f"compute_{virtual}"])
    return [f"-gencode=arch=compute_{virtual},code=[{codes}]"]


def code_of(folder: CudaFolder, real: list[str]) -> list[str]:
    """Flags for the PTX of a folder, and for machine code for those of the GPUs that are in its range."""
    flags = []
    for least, end in zip(folder.ptx, (*folder.ptx[1:], folder.end), strict=True):
        names = [name for name in real if least <= int(name) < end]
        if names or least == folder.ptx[0]:
            flags += generate_code(str(least), names)
    return flags


def cuda_module(nvcc: Path) -> Module:
    """The module fastattn._cuda."""
    host = ["-ccbin", compiler(), "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    common = ["-std=c++17", "-O3", *host]
    real = cuda_architectures(nvcc)
    objects = {}
    for folder in CUDA_FOLDERS:
        flags = [*common, *code_of(folder, real)]
        for family, head_dims in folder.families.items():
            source, name = f"csrc/cuda/{folder.name}/{family}.cu", f"{folder.name}_{family}"
            if not head_dims:
                objects[name] = Object(source, str(nvcc), flags)
            for dim in head_dims:
                objects[f"{name}_d{dim}"] = Object(source, str(nvcc), [*flags, f"-DFASTATTN_HEAD_DIM={dim}"])
    for name in ("kernel_table", "plan", "launch"):
        objects[name] = Object(f"csrc/cuda/host/{name}.cpp", str(nvcc), common)
    objects["bindings"] = _bindings("csrc/call/bindings_cuda.cpp", [])
    return Module(objects, [str(nvcc), "-shared", "-cudart", "static", *host], [])
