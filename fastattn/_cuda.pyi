"""The native module built from csrc/bindings_cuda.cpp."""

LARGEST_HEAD_DIM: int

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
    def plan_forward(self, addresses: dict[str, int]) -> tuple[str, int, int, int, bytes]: ...
    def forward(self, addresses: dict[str, int], device: int, stream: int) -> None: ...
