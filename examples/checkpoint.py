"""Checkpoints that are whole or not there: written beside their place and then moved onto it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch


def save(state: dict[str, Any], path: Path) -> None:
    """Writes a state of tensors, numbers, strings, lists and dictionaries.

    An interruption at any moment leaves the former checkpoint, or none, and never half of the new one.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the data must be on disk before the name points to it
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state saved there, on the CPU.

    Raises ValueError if there is none, or if its "settings" are not the given ones.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint to resume from: {path}")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise ValueError(f"{path} was made with {name} = {state['settings'].get(name)}, but this run has {value}")
    return state
