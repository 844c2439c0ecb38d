"""The arguments of the kernels: pointers, sizes and options, and named groups of them, which Triton passes as tuples.

None stands for what a call does not have: Triton then compiles the kernel without it.

The entries take most arguments one by one, and a kernel puts the groups together. Triton leaves no choice:
* Triton compiles a kernel anew for an integer that is 1, that is a multiple of 16, or neither.
* The arguments named in VARYING are exempt. Members of a tuple never are.
* Triton 3.6 confuses the strides of tuples within tuples.
So whatever changes from call to call stands alone, and only Arrays and constants of a model are tuples.
Groups that are made inside the kernels may hold other groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

VARYING = [
    *("cu_seqlens_q", "cu_seqlens_k", "kv_lengths", "q_offset", "batch", "seqlen_q", "seqlen_k", "seqlen_new"),
    *("seed_low", "seed_high", "threshold"),
    *("lse", "lse_residual", "dlse", "row_lse", "delta", "lse_accum", "lse_accum_residual"),
    *("rows", "heads_q", "splits", "stride_out", "stride_lse"),
    *("batches", "heads_out", "tiles_m", "tiles_n"),
]
"""Arguments, by name, for whose values no kernel is compiled anew."""

OPEN = 2**30
"""A side of a window that reaches past every key; its sum with a position stays within 32 bits."""

Pointer = Any
"""A torch.Tensor on the host, a pointer inside a kernel."""


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
    """Where each sequence of the batch lies, and how many keys it has. Made inside the kernels.

    Dense calls: `batch` sequences of `seqlen_q` queries and `seqlen_k` keys each.
    Varlen calls: seqlen_q and seqlen_k are totals; cu_seqlens_q and cu_seqlens_k say where each sequence begins.
    """

    cu_seqlens_q: Pointer | None  # (batch + 1,) int32
    cu_seqlens_k: Pointer | None  # (batch + 1,) int32
    kv_lengths: Pointer | None  # (batch,) int32, without the seqlen_new new keys
    q_offset: Pointer | None  # (batch,) int32: the position of query 0; None: see Window
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

    bottom_right: without q_offset, 1 if offset is the number of keys less that of queries, 0 if it is 0.
    """

    left: int | None
    right: int
    bottom_right: int


class Mask(NamedTuple):
    """What hides scores: the window, and a boolean mask in memory. Made inside the kernels; see mask.py."""

    window: Window
    data: Array | None  # bytes, 0 = hidden


class ScoreMod(NamedTuple):
    """What turns products of q and k into scores, in the order of the fields. Made inside the kernels."""

    scale: float
    softcap: float | None
    slopes: Array | None  # ALiBi, (batch, heads_q); rows and columns have stride 0
    bias: Array | None


class Dropout(NamedTuple):
    """A probability is kept iff its Philox word is at least `threshold`. Made inside the kernels.

    first_query: the number of query 0, see block_info.q_offset_of. All others are None without dropout. The seed and
    the threshold are the signed numbers of the same 32 bits.
    """

    seed_low: int | None
    seed_high: int | None
    threshold: int | None
    scale: float | None
    first_query: int


class KeysValues(NamedTuple):
    """Where keys and values come from. Made inside the kernels."""

    k: Array
    v: Array
    k_map: Any  # tensor descriptors of k and v, or None
    v_map: Any
    paging: Paging | None


class BwdRows(NamedTuple):
    """What the backward pass reads for each query: Arrays, or tiles loaded from them. Made inside the kernels."""

    dout: Any
    lse: Any  # see bwd_preprocess.py
    lse_residual: Any  # to be added to lse if FLOAT32, else meaningless
    delta: Any


class Paging(NamedTuple):
    """The block table (batch, max_pages) int32 of a paged cache, and the number of pages in the cache."""

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

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    BLOCK_D: int  # head_dim, padded to a power of two
    PART: int  # columns of the values (padded) that are accumulated together
    PARTS: int  # how many times that
    HEAD_DIM: int
    HEAD_DIM_V: int
    FLOAT32: bool  # of inputs: large scores lose no digits, see online_softmax.update and bwd_preprocess
    PRECISION: str  # of products of float32: "ieee" or "tf32x3"
    HAS_SCORE_MOD: bool  # False: scores are the products times a positive scale
    RELATIVE_TANH: bool  # see score_mod.tanh
    PERMUTED: bool  # see tiles.key_order
    ROWS_PER_PASS: int  # see tiles.load_block
    LAZY_RESCALE: bool  # see online_softmax.update
    ROW_SUMS: int  # see online_softmax.init
    INT64_OFFSETS: bool  # offsets within a block of rows need 64 bits
    PACK_GQA: bool = False  # the rows of a tile are those of all query heads of a key/value head
    PAGED: bool = False
    ROTARY_DIM: int = 0
    INTERLEAVED: bool = False
