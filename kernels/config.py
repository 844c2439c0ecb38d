"""Tile sizes, warps, stages and splits: pure functions of what is computed and of the architecture.

The numbers come from `python -m benchmarks.compile_report`: registers, spills, shared memory and instructions per
tensor-core instruction of each candidate, compiled for each architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Architecture(NamedTuple):
    """A device, as far as configurations depend on it.

    vendor: "cuda", "hip" or "interpreter". capability: 10 * major + minor of a CUDA device, 0 for others.
    shared_memory: bytes that one program can have. multiprocessors: how many programs run side by side, at least.
    """

    vendor: str
    capability: int
    shared_memory: int
    multiprocessors: int


class Shape(NamedTuple):
    """What the choice depends on of a call."""

    element_size: int  # bytes of an element of q
    head_dim: int
    head_dim_v: int
    rows: int  # of queries of one program's heads: seqlen_q, or seqlen_q * group if packed
    keys: int
    programs: int  # heads times sequences


class Config(NamedTuple):
    """Tile of queries and keys, and how many warps and pipeline stages work on it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


INTERPRETED = Config(64, 32, 4, 1)
"""For the interpreter, which takes as long for a small tile as for a large one: large enough, yet several of them."""

MOST_SPLITS = 64
PACKED_ROWS = 64
"""Up to this many queries of a group of heads are worth a tile of their own."""


def padded(dim: int) -> int:
    """The width of a tile that holds `dim` columns."""
    return max(16, 1 << (dim - 1).bit_length()) if dim > 0 else 16


def part(head_dim_v: int) -> int:
    """Columns of the values that are accumulated together: wider, and the softmax of a row would cross warps."""
    return min(padded(head_dim_v), 128)


def precision(architecture: Architecture) -> str:
    """How products of float32 are made: of three products of TF32 where tensor cores have it, to about float32's."""
    return "tf32x3" if architecture.vendor == "cuda" and architecture.capability >= 80 else "ieee"


def lazy(architecture: Architecture) -> bool:
    """Whether to rescale only when it is due. Where wgmma leaves few accumulators to a thread, it does not pay."""
    return not (architecture.vendor == "cuda" and 90 <= architecture.capability < 120)


def rows_at_once(config: Config, shape: Shape) -> int:
    """Rows of keys that all threads of a program load with one instruction each, of 16 bytes."""
    return max(1, config.num_warps * 32 * 16 // (padded(shape.head_dim) * shape.element_size))


def choose_forward(shape: Shape, architecture: Architecture) -> Config:
    """The configuration of the forward kernel."""
    if architecture.vendor == "interpreter":
        return INTERPRETED
    width = max(padded(shape.head_dim), padded(shape.head_dim_v))
    if shape.rows <= 32:
        # Decoding: memory bounds it, so many small blocks in flight.
        config = Config(16 if shape.rows <= 16 else 32, 64, 4, 3)
    elif architecture.vendor == "hip":
        config = Config(128, 64 if width <= 64 else 32, 8 if width > 128 else 4, 1)
    elif architecture.capability >= 90 and architecture.capability < 120:
        config = Config(128, 128 if width <= 128 else 64, 8, 2)
    else:
        config = Config(128, 64, 8 if width > 128 else 4, 2)
    if shape.element_size == 4:
        config = config._replace(block_m=min(config.block_m, 64), block_n=32, num_warps=4)
    return fitted(config, shape, architecture, forward_memory)


def choose_append(shape: Shape, architecture: Architecture) -> Config:
    """The configuration of the kernel that writes new keys into a cache: it only copies."""
    return INTERPRETED if architecture.vendor == "interpreter" else Config(16, 16, 4, 1)


def choose_gradient_of_queries(shape: Shape, architecture: Architecture) -> Config:
    """The configuration of the kernels for dQ and for the gradient of a bias."""
    if architecture.vendor == "interpreter":
        return INTERPRETED
    width = max(padded(shape.head_dim), padded(shape.head_dim_v))
    wide = architecture.vendor == "cuda" and 90 <= architecture.capability < 120
    if width <= 64:
        config = Config(128, 128 if wide else 32, 8 if wide else 4, 2)
    else:
        config = Config(128 if wide else 64, 64 if width <= 128 else 32, 8 if wide or width > 128 else 4, 2)
    if shape.element_size == 4:
        config = Config(32, 32, 4, 1)
    return fitted(config, shape, architecture, backward_memory)


def choose_gradient_of_keys(shape: Shape, architecture: Architecture) -> Config:
    """The configuration of the kernel for dK and dV."""
    if architecture.vendor == "interpreter":
        return INTERPRETED
    width = max(padded(shape.head_dim), padded(shape.head_dim_v))
    if width <= 64:
        config = Config(64, 128, 8, 2)
    else:
        config = Config(64 if width <= 128 else 32, 64, 8, 2)
    if shape.element_size == 4:
        config = Config(32, 32, 4, 1)
    return fitted(config, shape, architecture, backward_memory)


def fitted(config: Config, shape: Shape, architecture: Architecture, memory: Callable[[Config, Shape], int]) -> Config:
    """The same with fewer stages, or smaller tiles, as far as shared memory demands."""
    while memory(config, shape) > architecture.shared_memory:
        if config.num_stages > 1:
            config = config._replace(num_stages=config.num_stages - 1)
        elif config.block_n > 16:
            config = config._replace(block_n=config.block_n // 2)
        elif config.block_m > 16:
            config = config._replace(block_m=config.block_m // 2)
        else:
            break
    return config


def forward_memory(config: Config, shape: Shape) -> int:
    """Bytes of shared memory that the forward kernel takes at most."""
    rows = config.block_m * padded(shape.head_dim)
    keys = config.block_n * (padded(shape.head_dim) + padded(shape.head_dim_v))
    return shape.element_size * (rows + max(config.num_stages, 1) * keys)


def backward_memory(config: Config, shape: Shape) -> int:
    """Bytes of shared memory that a backward kernel takes at most: one side stays, the other is pipelined."""
    columns = padded(shape.head_dim) + padded(shape.head_dim_v)
    tiles = config.block_m + config.block_n
    scores = config.block_m * config.block_n
    return shape.element_size * (columns * tiles * max(config.num_stages, 1) + scores)


def choose_splits(shape: Shape, config: Config, architecture: Architecture) -> int:
    """Into how many parts the keys are cut, so that a few queries keep the whole device busy. 1 = not at all."""
    tiles = -(-shape.rows // config.block_m) * shape.programs
    blocks = shape.keys // (4 * config.block_n)  # what a program is worth starting for
    if tiles == 0 or shape.rows > PACKED_ROWS:
        return 1
    return max(1, min(2 * architecture.multiprocessors // tiles, blocks, MOST_SPLITS))
