"""The native module built from csrc/call/bindings_cuda.cpp."""

def why_unavailable() -> str: ...
def max_head_dim(capability: int) -> int: ...
def address_offsets() -> list[int]: ...
def splits(blocks: int, keys: int, slots: int) -> int: ...

class Call:
    def __init__(
        self,
        sizes: dict[str, int],
        numbers: dict[str, float],
        strides: dict[str, tuple[int, int, int, int]],
        dbias_size: tuple[int, ...],
    ) -> None: ...
    def workspace_bytes(
        self, operation: str, addresses: dict[str, int], capability: int, multiprocessors: int
    ) -> int: ...
    def plan(
        self, operation: str, addresses: dict[str, int], capability: int, multiprocessors: int
    ) -> list[tuple[str, int, int, int, bytes]]: ...
    def attend(
        self,
        q: int,
        k: int,
        v: int,
        out: int,
        lse: int,
        residual: int,
        workspace: int,
        capability: int,
        multiprocessors: int,
        device: int,
        stream: int,
    ) -> None: ...
    def gradients(
        self,
        q: int,
        k: int,
        v: int,
        out: int,
        lse: int,
        residual: int,
        dout: int,
        dq: int,
        dk: int,
        dv: int,
        workspace: int,
        capability: int,
        multiprocessors: int,
        device: int,
        stream: int,
    ) -> None: ...
    def run(
        self,
        operation: str,
        addresses: dict[str, int],
        capability: int,
        multiprocessors: int,
        device: int,
        stream: int,
    ) -> None: ...
