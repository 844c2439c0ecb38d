"""Keys and values of the tokens so far, for generation token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import attention_with_kv_cache
from ..problem import DTYPES, Inputs, check_heads, check_rank, check_shape, check_tensors
from .checks import check_count
from .pages import PageTable


class KVCache:
    """The keys and values of one attention layer, per sequence of a batch. Inference only.

        batch       number of sequences
        heads_kv    key/value heads
        capacity    most keys of one sequence; with page_size rounded up to whole pages
        head_dim    of the keys, and of the values unless head_dim_v is given
        page_size   None: one contiguous block per sequence. Else pages of so many keys, handed out as
                    sequences grow and shared between sequences that `reorder` made equal, until they differ
        num_pages   pages in all; None = enough for every sequence to reach its capacity
        dtype       float32, float64, bfloat16 or float16; queries, keys and values are cast to it

    Attributes: keys (batch, heads_kv, capacity, head_dim), or (num_pages, heads_kv, page_size, head_dim);
    values likewise with head_dim_v; lengths (batch,), int32; block_table (batch, max_pages), int32, None if
    contiguous.
    Raises TypeError or ValueError if a size is no positive integer; TypeError for another dtype.
    """

    def __init__(
        self,
        batch: int,
        heads_kv: int,
        capacity: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = {"batch": batch, "heads_kv": heads_kv, "capacity": capacity, "head_dim": head_dim}
        for name, size in {**sizes, "head_dim_v": head_dim_v}.items():
            check_count(name, size)
        if dtype is not None:
            _check_dtype("dtype must be", dtype)
        self.batch, self.page_size = batch, page_size
        self._pages: PageTable | None = None
        blocks, slots = batch, capacity
        if page_size is not None:
            self._pages = _page_table(batch, capacity, page_size, num_pages)
            capacity = self._pages.max_pages * page_size
            blocks, slots = self._pages.num_pages, page_size
        elif num_pages is not None:
            raise ValueError(f"num_pages needs a page_size, got num_pages={num_pages} without one")
        self.capacity = capacity
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be written to outside of it
            self.keys = torch.empty(blocks, heads_kv, slots, head_dim, dtype=dtype, device=device)
            self.values = torch.empty(blocks, heads_kv, slots, head_dim_v, dtype=dtype, device=device)
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            self.block_table: Tensor | None = None
            if self._pages is not None:
                self.block_table = torch.zeros(batch, self._pages.max_pages, dtype=torch.int32, device=device)
        self._lengths = [0] * batch  # the same on the host, so that nothing ever waits for the device

    @property
    def is_empty(self) -> bool:
        """True before the first key."""
        return not any(self._lengths)

    @property
    def free_pages(self) -> int | None:
        """Pages that no sequence uses; None for a contiguous cache."""
        return None if self._pages is None else len(self._pages.free)

    def attend(self, q: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None, **options: Any) -> Any:
        """Appends k_new and v_new, then `fastattn.attention_with_kv_cache` over all keys so far.

        q (batch, heads_q, seqlen_q, head_dim); k_new, v_new (batch, heads_kv, seqlen_new, head_dim /
        head_dim_v), or neither; options as there (rotary, causal, window, q_offset, mask, bias, alibi_slopes, softcap,
        sinks, scale, return_lse, backend). Returns out (batch, heads_q, seqlen_q, head_dim_v) in q's dtype,
        or (out, lse).
        Raises TypeError or ValueError if an argument does not fit, ValueError if a sequence would exceed the
        capacity or if there are too few pages; the cache is as before then.
        """
        self._check(q, k_new, v_new)
        new = 0 if k_new is None else k_new.shape[2]
        pages = self._make_room(new)
        dtype = self.keys.dtype
        try:
            result = attention_with_kv_cache(
                q.to(dtype),
                self.keys,
                self.values,
                cache_lengths=self.lengths,
                k_new=None if k_new is None else k_new.to(dtype),
                v_new=None if v_new is None else v_new.to(dtype),
                block_table=self.block_table,
                **options,
            )
        except BaseException:
            if pages is not self._pages:
                self._publish_pages()  # the ones from before
            raise
        self._pages = pages
        self.lengths += new
        self._lengths = [length + new for length in self._lengths]
        return (result[0].to(q.dtype), result[1]) if isinstance(result, tuple) else result.to(q.dtype)

    def truncate(self, lengths: Sequence[int] | Tensor | int) -> None:
        """Forgets keys: sequence b keeps its first lengths[b] (a number: all do); pages become free.

        Raises ValueError if a length is negative or greater than the present one.
        """
        if isinstance(lengths, int):
            lengths = [lengths] * self.batch
        wanted = _integers("lengths", lengths, self.batch)
        for b, (length, present) in enumerate(zip(wanted, self._lengths, strict=True)):
            if not 0 <= length <= present:
                raise ValueError(f"lengths[{b}] must be from 0 to the present length {present}, got {length}")
        self._lengths = wanted
        self.lengths.copy_(torch.tensor(wanted, dtype=torch.int32))
        if self._pages is not None:
            for b, length in enumerate(wanted):
                self._pages.keep(b, length)

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Empties the given sequences, or all, for new ones to take their places; their pages become free."""
        chosen = range(self.batch) if sequences is None else sequences
        _check_indices("sequences", chosen, self.batch)
        self.truncate([0 if b in chosen else length for b, length in enumerate(self._lengths)])

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Sequence b becomes what sequence indices[b] was, as beam search needs it. Paged: no key is moved.

        Raises ValueError unless indices are `batch` numbers from 0 to batch - 1.
        """
        wanted = _integers("indices", indices, self.batch)
        _check_indices("indices", wanted, self.batch)
        self._lengths = [self._lengths[i] for i in wanted]
        self.lengths.copy_(torch.tensor(self._lengths, dtype=torch.int32))
        if self._pages is None:
            rows = torch.tensor(wanted, device=self.keys.device)
            used = max(self._lengths)
            for x in (self.keys, self.values):
                x[:, :, :used] = x[rows, :, :used]
        else:
            self._pages.reorder(wanted)
            self._publish_pages()

    def _check(self, q: Any, k_new: Any, v_new: Any) -> None:
        """Types, dtypes and shapes: before pages are taken, and before `to` makes every dtype fit."""
        check_tensors("cache", Inputs(q, self.keys, self.values, kv_lengths=self.lengths, k_new=k_new, v_new=v_new))
        for name, x in (("q", q), ("k_new", k_new), ("v_new", v_new)):
            if x is not None:
                _check_dtype(f"{name} must have dtype", x.dtype)
        heads_kv, head_dim, head_dim_v = self.keys.shape[1], self.keys.shape[3], self.values.shape[3]
        spelled = "(batch, heads_q, seqlen_q, head_dim)"
        check_rank("q", q.shape, spelled)
        check_shape("q", q.shape, (self.batch, *q.shape[1:3], head_dim), spelled)
        check_heads(q.shape[1], heads_kv)
        if (k_new is None) != (v_new is None):
            given, missing = ("k_new", "v_new") if v_new is None else ("v_new", "k_new")
            raise ValueError(f"k_new and v_new go together, got {given} without {missing}")
        if k_new is None:
            return
        for name, x, last, width in (
            ("k_new", k_new, "head_dim", head_dim),
            ("v_new", v_new, "head_dim_v", head_dim_v),
        ):
            spelled = f"(batch, heads_kv, seqlen_new, {last})"
            check_rank(name, x.shape, spelled)
            check_shape(name, x.shape, (self.batch, heads_kv, k_new.shape[2], width), spelled)

    def _make_room(self, new: int) -> PageTable | None:
        """The page table with room for `new` keys, published, but not yet taken over."""
        for b, length in enumerate(self._lengths):
            if length + new > self.capacity:
                raise ValueError(
                    f"the cache holds at most {self.capacity} keys per sequence: sequence {b} has {length}, "
                    f"and {new} more were given"
                )
        if self._pages is None or new == 0:
            return self._pages
        pages, copies = self._pages.reserve(self._lengths, new)
        for source, target in copies:  # a target is a free page: nothing is lost if the call is refused
            self.keys[target] = self.keys[source]
            self.values[target] = self.values[source]
        if pages is not self._pages:
            self._publish_pages(pages)
        return pages

    def _publish_pages(self, pages: PageTable | None = None) -> None:
        pages = self._pages if pages is None else pages
        assert pages is not None
        assert self.block_table is not None
        self.block_table.copy_(torch.tensor(pages.rows(), dtype=torch.int32))


def _page_table(batch: int, capacity: int, page_size: int, num_pages: int | None) -> PageTable:
    check_count("page_size", page_size)
    max_pages = -(-capacity // page_size)
    if num_pages is None:
        num_pages = batch * max_pages
    check_count("num_pages", num_pages)
    return PageTable(batch, max_pages, num_pages, page_size)


def _check_dtype(what: str, dtype: Any) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{what} float32, float64, bfloat16 or float16, got {dtype}")


def _integers(name: str, values: Sequence[int] | Tensor, count: int) -> list[int]:
    integers = [int(x) for x in (values.tolist() if isinstance(values, Tensor) else values)]
    if len(integers) != count:
        raise ValueError(f"{name} must hold one number per sequence, {count}, got {len(integers)}")
    return integers


def _check_indices(name: str, indices: Sequence[int], batch: int) -> None:
    for index in indices:
        if not 0 <= index < batch:
            raise ValueError(f"{name} must hold numbers from 0 to {batch - 1}, got {index}")
