"""The CPU kernels for AVX-512 where the processor has none: right or wrong, never fast.

`python -m tests.native.emulate` (what `make emulate` does) compiles them with functions in place of AVX-512's
instructions (emulated/immintrin.h) and runs the tests of what they compute. It needs AVX2 and the headers of SIMDe,
0.7.4 or later (libsimde-dev in Debian).
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from fastattn import _cpu
from native_build import ROOT, X86, Object, compiler, cpu_module, kernel_flags

from ..backends.test_instruction_sets import TESTS
from .build import HERE, compile_all, run_simd_check

FOLDER = ROOT / "build" / "emulated"
INSTRUCTION_SETS = {"avx512": [], "avx512bf16": ["-DEMULATED_BF16"]}


def emulated_flags(instruction_set: str) -> list[str]:
    """`kernel_flags` without the instructions that are emulated."""
    flags = [flag for flag in kernel_flags(instruction_set) if not flag.startswith("-mavx512")]
    return [*flags, "-mavx2", f"-I{HERE / 'emulated'}", *INSTRUCTION_SETS[instruction_set]]


def build_module(folder: Path) -> None:
    """Compiles the module fastattn._cpu into a folder."""
    objects, link, libraries = cpu_module()
    for name in INSTRUCTION_SETS:
        objects[f"kernels_{name}"] = Object("csrc/cpu/kernels/table.cpp", compiler(), [*emulated_flags(name), "-O2"])
    source, program, flags = objects["instruction_sets"]
    objects["instruction_sets"] = Object(source, program, [*flags, "-D__builtin_cpu_supports(name)=1"])
    outputs = compile_all(objects, [], FOLDER)
    module = folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*link, *outputs, "-o", str(module), *libraries], check=True)


def link_to(source: Path, folder: Path) -> None:
    """Links to all of a folder except hidden files, what is built, and the module that takes another's place."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name.startswith((".", "_cpu.c")) or path.name in ("build", "fastattn"):
            continue
        link = folder / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path)


def why_not() -> str | None:
    """What is missing here."""
    if not X86:
        return "the kernels for AVX-512 are for x86-64"
    if "avx2" not in _cpu.instruction_sets():
        return "it needs a processor with AVX2, FMA and F16C"
    source = "#include <simde/x86/avx512.h>\n#include <simde/x86/avx512/dpbf16.h>\n"
    found = subprocess.run(
        [compiler(), "-x", "c++", "-E", "-"], input=source, text=True, capture_output=True, check=False
    )
    return "it needs the headers of SIMDe, 0.7.4 or later (libsimde-dev)" if found.returncode else None


def main() -> int:
    """Returns the exit status of the first tests that fail."""
    missing = why_not()
    if missing is not None:
        print(f"make emulate: {missing}", file=sys.stderr)
        return 2
    link_to(ROOT, FOLDER)
    link_to(ROOT / "fastattn", FOLDER / "fastattn")
    build_module(FOLDER / "fastattn")
    for name in INSTRUCTION_SETS:
        print(f"== {name}", flush=True)
        printed = run_simd_check(name, FOLDER, emulated_flags(name))
        print(printed, flush=True)
        if not printed.endswith("\n0 failures\n"):
            return 1
        files = [f"tests/test_{test}.py" for test in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "-k", "cpu", *files]
        environment = {**os.environ, "FASTATTN_CPU_ISA": name, "PYTHONPATH": str(FOLDER)}
        status = subprocess.run(command, cwd=FOLDER, env=environment, check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
