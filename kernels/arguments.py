"""What the kernels are handed: pointers, sizes and options, and named groups of them, which Triton passes as tuples.

None stands for something that a call does not have; Triton compiles a kernel without it then. It also compiles a kernel
anew for a number that is 1, that is a multiple of 16, or neither: always within tuples, and not for the arguments named
in VARYING. So what changes from call to call is handed over by itself, and a kernel puts the group together. The same
goes for groups that hold groups: Triton 3.6 mistakes their strides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

VARYING = [
    *("cu_seqlens_q", "cu_seqlens_k", "kv_lengths", "batch", "seqlen_q", "seqlen_k", "seqlen_new"),
    *("seed_low", "seed_high", "threshold"),
    *("lse", "lse_residual", "dlse", "row_lse", "delta", "partial_lse", "partial_residual"),
    *("rows", "heads_q", "splits", "stride_out", "stride_lse"),
    *("batches", "heads_out", "tiles_m", "tiles_n"),
]
"""Arguments of any kernel that it is not compiled anew for."""

OPEN = 2**30
"""A side of a window that reaches past every key; sums of it with a position stay within 32 bits."""

Pointer = Any
"""A torch.Tensor on the way into a kernel, a pointer inside it."""


class Array(NamedTuple):
    """A tensor of (batch, head, row, column) with its strides in elements.

    Varlen tensors have batch stride 0. A broadcast dimension has stride 0.
    """

    data: Pointer
    batch: int
    head: int
    row: int
    column: int


class Sequences(NamedTuple):
    """Where each sequence of the batch lies, and how many keys it has.

    Dense calls: `batch` sequences of `seqlen_q` queries and `seqlen_k` keys each. Varlen: seqlen_q and seqlen_k are
    totals, cu_seqlens_q and cu_seqlens_k (batch + 1,) int32 say where each sequence begins.
    kv_lengths: (batch,) int32; `seqlen_new` is added to them. Made inside the kernels.
    """

    cu_seqlens_q: Pointer | None
    cu_seqlens_k: Pointer | None
    kv_lengths: Pointer | None
    batch: int
    seqlen_q: int
    seqlen_k: int
    seqlen_new: int


class Heads(NamedTuple):
    """heads_q = heads_kv * group."""

    heads_q: int
    heads_kv: int
    group: int


class Window(NamedTuple):
    """Query i sees the keys from i + offset - left to i + offset + right; left None = all to the left.

    bottom_right: 1 if offset is the keys less the queries, 0 if it is 0.
    """

    left: int | None
    right: int
    bottom_right: int


class Scores(NamedTuple):
    """How the products of q and k become scores, in the order of the fields. Made inside the kernels."""

    scale: float
    softcap: float | None
    slopes: Array | None  # ALiBi, (batch, heads_q); rows and columns have stride 0
    bias: Array | None
    mask: Array | None  # bytes, 0 = hidden


class Dropout(NamedTuple):
    """A probability is kept iff its Philox word is at least `threshold`; both halves of the seed as signed 32 bits.

    All are None without dropout. Made inside the kernels.
    """

    seed_low: int | None
    seed_high: int | None
    threshold: int | None
    scale: float | None


class Paging(NamedTuple):
    """The block table (batch, max_pages) int32 of a paged cache, and the number of pages there are."""

    table: Pointer
    stride: int
    page_size: int
    pages: int


class Rotation(NamedTuple):
    """Tables (max_positions, rotary_dim / 2), contiguous, in float32."""

    cos: Pointer
    sin: Pointer
    max_positions: int


@dataclass(frozen=True)
class Variant:
    """What is fixed when a kernel is compiled: one constexpr argument of each kernel."""

    BLOCK_M: int  # rows of queries
    BLOCK_N: int  # keys
    BLOCK_D: int  # head_dim, padded to a power of two
    PART: int  # columns of the values (padded) that are accumulated together
    PARTS: int  # how many times that
    HEAD_DIM: int
    HEAD_DIM_V: int
    FLOAT32: bool  # of inputs: large scores lose no digits, see softmax.update and backward.statistics
    PRECISION: str  # of products of float32: "ieee" or "tf32x3"
    PLAIN: bool  # scores are the products times a positive scale
    RELATIVE: bool  # see scores.tanh
    PERMUTED: bool  # see tiles.key_order
    PASS: int  # see tiles.load_block
    LAZY: bool  # see softmax.update
    SUMS: int  # see softmax.start
    WIDE: bool  # offsets within a block of rows need 64 bits
    PACKED: bool = False  # the rows of a tile are those of all query heads of a key/value head
    PAGED: bool = False
    ROTARY_DIM: int = 0
    INTERLEAVED: bool = False
