"""The native module built from csrc/call/bindings_cpu.cpp."""

from collections.abc import Callable

from torch import Tensor

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def layout_reader(tensor_type: type[Tensor]) -> Callable[..., bytes] | None: ...
def multiply_adds(dtype: int, steps: int, threads: int) -> int: ...

class Call:
    def __init__(
        self,
        sizes: dict[str, int],
        numbers: dict[str, float],
        strides: dict[str, tuple[int, int, int, int]],
        dbias_size: tuple[int, ...],
    ) -> None: ...
    def attend(self, q: int, k: int, v: int, out: int, lse: int, residual: int, threads: int) -> None: ...
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
        threads: int,
    ) -> None: ...
    def forward(self, addresses: dict[str, int], seed: int, threads: int) -> None: ...
    def forward_with_cache(self, addresses: dict[str, int], seed: int, threads: int) -> None: ...
    def backward(self, addresses: dict[str, int], seed: int, threads: int) -> None: ...
