"""Builds the native modules with ninja. Sources and flags are in native_build.py, metadata in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a build in isolation does not look here by itself

from native_build import COMMON, ROOT, compiler, core_objects, libraries


def module_objects() -> dict[str, tuple[str, list[str]]]:
    """Object name -> (source, flags) of the module fastattn._cpu."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    return {**core_objects(), "bindings": ("csrc/bindings_cpu.cpp", [*COMMON, "-O2", *includes])}


def quoted(words: list[str]) -> str:
    """Words of a shell command inside a ninja file."""
    return " ".join("'" + word.replace("$", "$$") + "'" for word in words)


def path(p: Path) -> str:
    """A path as ninja reads it."""
    return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Compiles the objects side by side, and again only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        """Writes a build.ninja and runs it."""
        target, folder = Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f"cxx = {compiler()}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx -shared $in -o $out {quoted(libraries())}",
        ]
        outputs = []
        for name, (source, flags) in module_objects().items():
            outputs.append(path(folder / f"{name}.o"))
            lines += [f"build {outputs[-1]}: compile {path(ROOT / source)}", f"  flags = {quoted(flags)}"]
        lines.append(f"build {path(target)}: link {' '.join(outputs)}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([ninja_program(), "-C", str(folder)], check=True)


def ninja_program() -> str:
    """The ninja of the build requirements, or one on the PATH."""
    try:
        import ninja
    except ImportError:
        return "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")


setup(ext_modules=[Extension("fastattn._cpu", sources=[])], cmdclass={"build_ext": NinjaBuild})
