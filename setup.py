"""Builds the native modules with ninja, and finds the packages.

Sources and flags are in native_build.py, metadata in pyproject.toml.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a build in isolation does not look here by itself

from native_build import ROOT, modules


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
        module = MODULES[ext.name]()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / ext.name
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            "rule compile",
            "  command = $compiler -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {quoted(module.linker)} $in -o $out {quoted(module.libraries)}",
        ]
        outputs = []
        for name, made in module.objects.items():
            outputs.append(path(folder / f"{name}.o"))
            lines += [
                f"build {outputs[-1]}: compile {path(ROOT / made.source)}",
                f"  compiler = {made.compiler}",
                f"  flags = {quoted(made.flags)}",
            ]
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


def packages() -> list[str]:
    """The packages of fastattn, and those of the folders that are installed inside it (package-dir, pyproject.toml)."""
    found = set(find_packages(str(ROOT), include=["fastattn", "fastattn.*"]))
    for folder in ("benchmarks", "kernels"):
        inside = find_packages(str(ROOT / folder))
        found |= {f"fastattn.{folder}", *(f"fastattn.{folder}.{name}" for name in inside)}
    return sorted(found)


MODULES = modules()

setup(
    packages=packages(),
    ext_modules=[Extension(name, sources=[]) for name in MODULES],
    cmdclass={"build_ext": NinjaBuild},
)
