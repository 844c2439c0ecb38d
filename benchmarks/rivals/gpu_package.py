"""What the GPU packages flash-attn and xformers have in common."""

from __future__ import annotations

from importlib.util import find_spec

from ..cases import Case
from ..data import Data


def why_unavailable(package: str, case: Case, data: Data) -> str | None:
    """Why a GPU package cannot run at all: not installed, wrong device or wrong dtype. None if it can."""
    if find_spec(package) is None:
        return f"the package {package} is not installed"
    if data.q.device.type != "cuda":
        return f"{package} runs on CUDA devices only"
    if case.dtype not in ("float16", "bfloat16"):
        return f"{package} computes float16 and bfloat16, not {case.dtype}"
    return None
