"""The backend `triton`. Importing it does not import Triton."""

from .backend import TritonBackend

__all__ = ["TritonBackend"]
