"""The native module built from csrc/bindings_cuda.cpp."""

from enum import Enum

HEAD_DIMS: tuple[int, ...]

class Operation(Enum):
    forward = 0
    backward = 1
    with_cache = 2

def why_unavailable() -> str: ...
def address_offsets() -> list[int]: ...

class Call:
    def __init__(
        self,
        sizes: dict[str, int],
        numbers: dict[str, float],
        strides: dict[str, tuple[int, int, int, int]],
        dbias_size: tuple[int, ...],
    ) -> None: ...
    def workspace_bytes(
        self, operation: Operation, addresses: dict[str, int], capability: int, multiprocessors: int
    ) -> int: ...
    def plan(
        self,
        operation: Operation,
        addresses: dict[str, int],
        seed: int,
        capability: int,
        multiprocessors: int,
        workspace: int,
    ) -> list[tuple[str, int, int, int, bytes]]: ...
    def run(
        self, operation: Operation, addresses: dict[str, int], seed: int, device: int, stream: int, workspace: int
    ) -> None: ...
