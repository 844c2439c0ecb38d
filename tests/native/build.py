"""Compiles and runs the C++ checks in this folder.

`python -m tests.native.build sanitize` (what `make sanitize` does) runs core_check under AddressSanitizer with
UndefinedBehaviorSanitizer, and under ThreadSanitizer.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from native_build import COMMON, ROOT, Object, compiler, core_objects, kernel_flags, libraries

HERE = Path(__file__).parent
# The threads of OpenMP are not instrumented: the core's own are used.
SANITIZERS = {
    "address,undefined": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DFASTATTN_POISON"],
    "thread": ["-fsanitize=thread", "-DFASTATTN_NO_OPENMP"],
}


def run_simd_check(instruction_set: str, folder: Path, flags: Sequence[str] = ()) -> str:
    """Compiles simd_check.cpp for an instruction set, with its flags or others, and runs it; returns its output."""
    program = folder / f"simd_check_{instruction_set}"
    command = [compiler(), *(flags or kernel_flags(instruction_set)), "-O1", "-w", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(HERE / "simd_check.cpp"), "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True, check=False).stdout


def compile_all(objects: Mapping[str, Object], flags: Sequence[str], folder: Path) -> list[str]:
    """Compiles with additional flags; returns the object files."""

    def compile_one(item: tuple[str, Object]) -> str:
        name, (source, program, own) = item
        output = str(folder / f"{name}.o")
        command = [program, *own, "-w", *flags, f"-I{ROOT / 'csrc'}", "-c", str(ROOT / source)]
        subprocess.run([*command, "-o", output], check=True)
        return output

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, objects.items()))


def run_core_check(flags: Sequence[str], folder: Path) -> int:
    """Compiles the core and core_check.cpp with additional flags and runs it; returns its exit status."""
    main = Object(str(HERE.relative_to(ROOT) / "core_check.cpp"), compiler(), COMMON)
    outputs = compile_all({**core_objects(), "main": main}, ["-O1", "-g", *flags], folder)
    program = str(folder / "core_check")
    subprocess.run([compiler(), *flags, *outputs, "-o", program, *libraries()], check=True)
    return subprocess.run([program], check=False).returncode


def main(arguments: Sequence[str]) -> int:
    """Runs the checks under each sanitizer; returns the first exit status that is not 0."""
    if list(arguments) != ["sanitize"]:
        print("usage: python -m tests.native.build sanitize", file=sys.stderr)
        return 2
    for name, flags in SANITIZERS.items():
        print(f"== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            status = run_core_check(flags, Path(folder))
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
