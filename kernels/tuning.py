"""FASTATTN_AUTOTUNE=1: a kernel's first call of a kind times some configurations, and the fastest is kept on disk.

Off by default: the first call would take seconds, and results could differ in the last bits between runs that tune and
chose differently. The file is autotune.json in FASTATTN_CACHE_DIR (default: ~/.cache/fastattn).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from .config import Config, Shape
from .launch import Launch

Build = Callable[[Config], Sequence[Launch]]


def asked_for() -> bool:
    """Whether FASTATTN_AUTOTUNE allows tuning."""
    return os.environ.get("FASTATTN_AUTOTUNE", "0") == "1"


def default_file() -> Path:
    """Where choices are kept."""
    folder = os.environ.get("FASTATTN_CACHE_DIR")
    return (Path(folder) if folder else Path.home() / ".cache" / "fastattn") / "autotune.json"


class Tuner:
    """Chooses by trying. device: what the choices are valid for. time: seconds of launches."""

    def __init__(self, device: str, file: Path, time: Callable[[Sequence[Launch]], float]) -> None:
        self._device, self._file, self._time = device, file, time
        self._known: dict[str, Config] = {}

    def choose(self, kernel: str, shape: Shape, candidates: Sequence[Config], build: Build) -> Config:
        """The fastest of the candidates, from memory, from the file, or by timing what `build` makes of each."""
        key = f"{self._device}|{kernel}|{bucket(shape)}"
        if key not in self._known:
            known = self._read()
            if tuple(known.get(key, ())) in candidates:
                self._known[key] = Config(*known[key])
            else:
                self._known[key] = self._fastest(candidates, build)
                self._write({**self._read(), key: list(self._known[key])})
        return self._known[key]

    def _fastest(self, candidates: Sequence[Config], build: Build) -> Config:
        timed = []
        for candidate in candidates:
            try:
                timed.append((self._time(build(candidate)), candidate))
            except Exception:  # a tile that the compiler or the device refuses is not the fastest
                if candidate is candidates[0]:
                    raise
        return min(timed, key=lambda pair: pair[0])[1]

    def _read(self) -> dict[str, list[int]]:
        try:
            found = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, choices: dict[str, list[int]]) -> None:
        """Whole or not at all, as other processes read it; a folder that cannot be written costs tuning again."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False) as file:
                json.dump(choices, file, indent=1, sort_keys=True)
            os.replace(file.name, self._file)
        except OSError:
            pass


def bucket(shape: Shape) -> Shape:
    """Calls that share a choice: sizes up to the next power of two."""
    rows, keys, programs = (1 << max(n - 1, 0).bit_length() for n in (shape.rows, shape.keys, shape.programs))
    return shape._replace(rows=rows, keys=keys, programs=programs)
