"""Tile sizes, warps, stages and splits: pure functions of what is computed and of the architecture.

The numbers come from `python -m benchmarks.inspect.compile_report`: registers, spills, shared memory and
instructions per tensor-core instruction of each candidate, compiled for each architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Architecture(NamedTuple):
    """A device, as far as configurations depend on it.

    vendor: "cuda", "hip" or "interpreter". capability: 10 * major + minor of a CUDA device, 0 for others.
    shared_memory: bytes that one program can have. multiprocessors: how many programs run side by side, at least.
    compiler: Triton's version, (major, minor).
    """

    vendor: str
    capability: int
    shared_memory: int
    multiprocessors: int
    compiler: tuple[int, int]


class Shape(NamedTuple):
    """What the choice of a configuration depends on of a call."""

    element_size: int  # bytes of an element of q
    head_dim: int
    head_dim_v: int
    rows: int  # of queries: seqlen_q, or seqlen_q * group if packed
    keys: int
    programs: int  # heads times sequences
    loads_scores: bool  # an element of a mask or bias is read for each score
    masks: bool  # a mask
    drops: bool  # dropout
    packed: bool = False  # the query heads of a group share tiles
    call: str = ""  # the kind of the call and its features, by which tuning tells calls apart

    @property
    def permuted(self) -> bool:
        """Whether keys are loaded in the order that suits dropout, mask and bias; see tiles.key_order."""
        return self.loads_scores or self.drops


class Config(NamedTuple):
    """Tile of queries and keys, and how many warps and pipeline stages work on it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


INTERPRETED = Config(64, 32, 4, 1)
"""For the interpreter, whose time hardly depends on the tile: large, but small enough for several per call."""

MAX_SPLITS = 64
MAX_PACKED_ROWS = 64
"""Up to this many queries, heads of a group share a tile, and keys are split. More keep a device busy anyway."""


def padded(dim: int) -> int:
    """The width of a tile that holds `dim` columns.

    Not 16: with values that wide beside keys 32 wide, Triton 3.6 compiles wrong code for an H100 in half precision.
    """
    return max(32, 1 << (dim - 1).bit_length()) if dim > 0 else 32


def part(head_dim_v: int) -> int:
    """Columns of the values that are accumulated together. With more, the softmax of a row would cross warps."""
    return min(padded(head_dim_v), 128)


def precision(architecture: Architecture) -> str:
    """How float32 is multiplied: by three products of TF32 where tensor cores have it, nearly as exact."""
    return "tf32x3" if architecture.vendor == "cuda" and architecture.capability >= 80 else "ieee"


def lazy_rescale(architecture: Architecture) -> bool:
    """Whether to rescale only when needed. With wgmma a thread has few accumulators, and it does not pay."""
    return not has_wgmma(architecture)


def row_sums(shape: Shape) -> int:
    """Sums per row in the softmax. With a mask, Triton 3.9 would compute exponentials twice to split them."""
    return 1 if shape.masks else 8


def use_tensor_maps(shape: Shape, architecture: Architecture) -> bool:
    """Whether the forward kernel loads full blocks through tensor descriptors: at head_dim 64 that saves nothing."""
    wide = min(padded(shape.head_dim), padded(shape.head_dim_v)) >= 128
    return has_wgmma(architecture) and wide and shape.rows > 32 and shape.element_size == 2


def rows_per_pass(config: Config, shape: Shape, architecture: Architecture) -> int:
    """Rows of keys that all threads of a program load with one instruction each, of 16 bytes."""
    rows = max(1, config.num_warps * 32 * 16 // (padded(shape.head_dim) * shape.element_size))
    return max(rows, 32) if has_wgmma(architecture) else rows


def choose_forward(shape: Shape, architecture: Architecture) -> Config:
    """The configuration of the forward kernel."""
    width = max(padded(shape.head_dim), padded(shape.head_dim_v))
    if architecture.vendor == "interpreter":
        return INTERPRETED
    if is_turing(architecture):
        config = _turing_forward(width)
    elif shape.rows <= 32:
        # Decoding: memory bounds it, so many small blocks in flight.
        config = Config(16 if shape.rows <= 16 else 32, 64, 4, 1 if architecture.vendor == "hip" else 3)
    elif architecture.vendor == "hip":
        config = Config(128, 64 if width <= 64 else 32, 8 if width > 128 else 4, 1)
    elif is_hopper(architecture) and width <= 128:
        eight = width <= 64 or shape.loads_scores or shape.drops
        config = Config(128, 64, 8, 3) if eight else Config(128, 64, 4, 2)
    elif has_wgmma(architecture):
        config = Config(128, 64 if width > 128 or shape.loads_scores else 128, 8, 2)
    else:
        config = Config(128, 64, 8 if width > 128 else 4, 2)
        if 64 < width <= 128 and architecture.compiler < (3, 8):
            config = config._replace(block_n=32)  # of 64 keys ptxas of Triton 3.6 makes 3300 spills
    if shape.element_size == 4:
        config = _float32_forward(width)
    return fit_shared_memory(config, shape, architecture, forward_memory)


def _float32_forward(width: int) -> Config:
    return Config(64, 32, 4, 2) if width <= 64 else Config(32, 32, 4 if width <= 128 else 8, 2)


def _float32_backward(width: int) -> Config:
    return Config(32, 32, 4 if width <= 64 else 8, 2) if width <= 128 else Config(16, 16, 8, 2)


def is_turing(architecture: Architecture) -> bool:
    """Triton 3.9 multiplies there without tensor cores, in float32, and larger tiles spill thousands of registers."""
    return architecture.vendor == "cuda" and architecture.capability < 80


def _turing_forward(width: int) -> Config:
    return Config(32, 32 if width <= 128 else 16, 4 if width <= 64 else 8, 1)


def _turing_backward(width: int) -> Config:
    return Config(32, 32, 8, 1) if width <= 128 else Config(16, 16, 8, 1)


def choose_append_kv(shape: Shape, architecture: Architecture) -> Config:
    """The configuration of the kernel that writes new keys into a cache: it only copies."""
    return INTERPRETED if architecture.vendor == "interpreter" else Config(16, 16, 4, 1)


def choose_bwd_dq(shape: Shape, architecture: Architecture) -> Config:
    """The configuration of the kernel for dQ."""
    width = max(padded(shape.head_dim), padded(shape.head_dim_v))
    if architecture.vendor == "interpreter":
        return INTERPRETED
    if is_turing(architecture):
        config = _turing_backward(width)
    elif architecture.vendor == "hip":
        config = Config(64 if width <= 128 else 32, 64 if width <= 64 else 32, 8 if width > 128 else 4, 1)
    elif is_hopper(architecture) and width <= 128:
        config = Config(64, 64, 4, 3) if width <= 64 else Config(128, 64, 8, 3)
    elif has_wgmma(architecture):
        narrow = width > 64 or shape.loads_scores or shape.drops
        config = Config(128 if width <= 128 else 64, 64 if narrow else 128, 8, 2)
    elif width <= 64:
        config = Config(64, 64, 4, 2) if shape.loads_scores else Config(128, 32, 4, 2)
    else:
        config = Config(64, 64 if width <= 128 else 32, 8 if width > 128 else 4, 2)
    if shape.element_size == 4:
        config = _float32_backward(width)
    return fit_shared_memory(config, shape, architecture, bwd_dq_memory)


def choose_bwd_dkdv(shape: Shape, architecture: Architecture) -> Config:
    """The configuration of the kernel for dK and dV."""
    width = max(padded(shape.head_dim), padded(shape.head_dim_v))
    if architecture.vendor == "interpreter":
        return INTERPRETED
    if is_turing(architecture):
        config = _turing_backward(width)
    elif architecture.vendor == "hip":
        small = width > 64 or shape.drops or shape.loads_scores
        config = Config(32 if small else 64, 64 if width <= 128 else 32, 8 if width > 128 else 4, 1)
    elif width <= 64 and (shape.drops or shape.loads_scores):
        # More would not fit into registers. Accumulators in tensor memory need some of them, too.
        config = Config(32, 32 if shape.loads_scores and architecture.capability // 10 == 10 else 64, 4, 2)
    elif is_hopper(architecture) and width <= 128 and not shape.loads_scores:
        config = Config(64 if width <= 64 else 32, 64, 4, 3)
    elif width <= 64:
        config = Config(64, 128, 8, 2)
    elif width <= 128:
        config = Config(64, 64, 8, 2)
    else:
        config = Config(32, 64, 8, 2)
    if shape.element_size == 4:
        config = _float32_backward(width)
    return fit_shared_memory(config, shape, architecture, bwd_dkdv_memory)


def choose_bwd_dbias(shape: Shape, architecture: Architecture) -> Config:
    """The configuration of the kernel for the gradient of a bias, which keeps a tile of scores in registers."""
    width = max(padded(shape.head_dim), padded(shape.head_dim_v))
    if architecture.vendor == "interpreter":
        return INTERPRETED
    if is_turing(architecture):
        config = _turing_backward(width)
    else:
        stages = 1 if architecture.vendor == "hip" else 2
        config = Config(64, 64 if width <= 128 else 32, 4, stages)
    if shape.element_size == 4:
        config = _float32_backward(width)
    return fit_shared_memory(config, shape, architecture, bwd_dq_memory)


def fit_shared_memory(
    config: Config, shape: Shape, architecture: Architecture, memory: Callable[[Config, Shape, Architecture], int]
) -> Config:
    """The configuration with fewer stages, or smaller tiles, until it fits into shared memory."""
    while memory(config, shape, architecture) > architecture.shared_memory:
        if config.num_stages > 2:
            config = config._replace(num_stages=config.num_stages - 1)
        elif config.block_n > 16:
            config = config._replace(block_n=config.block_n // 2)
        elif config.block_m > 16:
            config = config._replace(block_m=config.block_m // 2)
        else:
            break
    return config


def buffers(config: Config, shape: Shape, architecture: Architecture) -> int:
    """Copies of a pipelined tile in shared memory; wgmma reads one while another is being filled."""
    all_stages = has_wgmma(architecture) or shape.element_size == 4
    return max(1, config.num_stages if all_stages else config.num_stages - 1)


def is_hopper(architecture: Architecture) -> bool:
    """Whether it is an H100, an H200 or the like, on which tiles up to 128 wide were measured."""
    return architecture.vendor == "cuda" and architecture.capability // 10 == 9


def has_wgmma(architecture: Architecture) -> bool:
    """Whether tensor cores take their operands from shared memory: Hopper and its successors for data centres."""
    return architecture.vendor == "cuda" and 90 <= architecture.capability < 120


def forward_memory(config: Config, shape: Shape, architecture: Architecture) -> int:
    """Bytes of shared memory that the forward kernel takes at most; AMD's keep queries in registers."""
    rows = config.block_m * padded(shape.head_dim) if architecture.vendor != "hip" else 0
    keys = config.block_n * (padded(shape.head_dim) + padded(shape.head_dim_v))
    scores = 2 * config.block_m * config.block_n if shape.element_size == 4 else 0
    return shape.element_size * (rows + buffers(config, shape, architecture) * keys + scores) + 1024


def bwd_dq_memory(config: Config, shape: Shape, architecture: Architecture) -> int:
    """Bytes of shared memory that the kernel for dQ takes at most: queries stay, keys are pipelined."""
    columns = padded(shape.head_dim) + padded(shape.head_dim_v)
    rows = config.block_m + config.block_n * buffers(config, shape, architecture)
    return shape.element_size * (columns * rows + config.block_m * config.block_n) + 1024


def bwd_dkdv_memory(config: Config, shape: Shape, architecture: Architecture) -> int:
    """Bytes of shared memory that the kernel for dK and dV takes at most: keys stay, queries are pipelined."""
    columns = padded(shape.head_dim) + padded(shape.head_dim_v)
    rows = config.block_n + config.block_m * buffers(config, shape, architecture)
    return shape.element_size * (columns * rows + 2 * config.block_m * config.block_n) + 1024


CHOOSERS = {
    "forward": (choose_forward, forward_memory),
    "bwd_dq": (choose_bwd_dq, bwd_dq_memory),
    "bwd_dkdv": (choose_bwd_dkdv, bwd_dkdv_memory),
    "bwd_dbias": (choose_bwd_dbias, bwd_dq_memory),  # not tuned: its result's layout depends on it
}
"""By kernel: what chooses its configuration, and how much shared memory that takes."""


def choose(kernel: str, shape: Shape, architecture: Architecture) -> Config:
    """The configuration of a kernel by name."""
    return CHOOSERS[kernel][0](shape, architecture)


def candidates(kernel: str, shape: Shape, architecture: Architecture) -> list[Config]:
    """What tuning tries: the choice, then its neighbours as far as they fit into shared memory."""
    chosen = choose(kernel, shape, architecture)
    memory = CHOOSERS[kernel][1]
    found = [chosen]
    for m, n in ((1, 1), (2, 1), (1, 2), (1, 0.5), (0.5, 1), (0.5, 2)):
        for warps in (4, 8):
            for stages in (1, 2, 3):
                config = Config(int(chosen.block_m * m), int(chosen.block_n * n), warps, stages)
                fits = memory(config, shape, architecture) <= architecture.shared_memory
                if min(config[:2]) >= 16 and max(config[:2]) <= 256 and fits and config not in found:
                    found.append(config)
    return found


def why_not(shape: Shape, architecture: Architecture) -> str | None:
    """None if shared memory holds the smallest tiles of every kernel, else a sentence."""
    if architecture.vendor == "interpreter":
        return None
    dims = f"head_dim {shape.head_dim} and head_dim_v {shape.head_dim_v}"
    if shape.element_size == 4 and max(shape.head_dim, shape.head_dim_v) > 256:
        return f"{dims} in float32 need more registers than a GPU has; this backend takes at most 256 in float32."
    if architecture.vendor == "hip" and max(shape.head_dim, shape.head_dim_v) > 256:
        return f"{dims} need more shared memory than AMD GPUs have; this backend takes at most 256 there."
    needed = max(
        forward_memory(choose_forward(shape, architecture), shape, architecture),
        bwd_dq_memory(choose_bwd_dq(shape, architecture), shape, architecture),
        bwd_dkdv_memory(choose_bwd_dkdv(shape, architecture), shape, architecture),
    )
    if needed > architecture.shared_memory:
        return (
            f"{dims} need {needed} bytes of shared memory, and the GPU has {architecture.shared_memory} for a program."
        )
    return None


def choose_splits(shape: Shape, config: Config, architecture: Architecture) -> int:
    """Into how many splits the keys are divided, so that a few queries keep the whole device busy."""
    tiles = -(-shape.rows // config.block_m) * shape.programs
    blocks = shape.keys // (4 * config.block_n)  # what a program is worth starting for
    if tiles == 0 or shape.rows > MAX_PACKED_ROWS:
        return 1
    return max(1, min(2 * architecture.multiprocessors // tiles, blocks, MAX_SPLITS))
