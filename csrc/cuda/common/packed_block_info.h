// Which rows and keys a block of a call with a cache works on. All query heads that share a key/value head read the
// same keys, so their rows are packed into one tile: row r of a key/value head is query r / group of head r % group.
#pragma once

#include "arguments.h"
#include "grid.h"
#include "mask.h"

namespace fastattn {
namespace cuda {

struct PackedBlockInfo {
  int64_t b;
  int head_kv, split;
  int group;                // query heads per key/value head
  int first_row, last_row;  // the last one exists
  Mask mask;                // its rows are queries, not packed rows
  ColumnRange columns;
  // Of the key/value head, in page 0 of the cache (of sequence 0, if it is contiguous); and the pages of the sequence.
  const char *k, *v;
  const int32_t* pages;

  PackedBlockInfo() = default;

  // Blocks are numbered by tiles first, which read the same keys, then splits, key/value heads and sequences.
  __device__ __forceinline__ PackedBlockInfo(const Arguments& a, int rows) {
    const Params& p = a.p;
    const int64_t tiles = packed_tiles(p, rows), index = blockIdx.x;
    first_row = static_cast<int>(index % tiles) * rows;
    split = static_cast<int>(index / tiles % a.splits);
    head_kv = static_cast<int>(index / tiles / a.splits % p.heads_kv);
    b = index / tiles / a.splits / p.heads_kv;
    group = static_cast<int>(p.heads_q / p.heads_kv);
    last_row = min(first_row + rows, static_cast<int>(p.seqlen_q) * group) - 1;
    mask = Mask(p, sequence_of(p, b));
    columns = mask.columns<Rows::kQueries>(query(first_row), query(last_row), static_cast<int>(p.seqlen_q));
    k = static_cast<const char*>(p.k.data) + head_kv * p.k.stride_h * 2;
    v = static_cast<const char*>(p.v.data) + head_kv * p.v.stride_h * 2;
    pages = p.block_table == nullptr ? nullptr : p.block_table + b * p.max_pages;
  }

  __device__ __forceinline__ bool exists(int r) const { return r <= last_row; }

  // Rows that do not exist count as the last one.
  __device__ __forceinline__ int query(int r) const { return min(r, last_row) / group; }
  __device__ __forceinline__ int head(int r) const { return head_kv * group + min(r, last_row) % group; }

  // Where the result of this split for a row is, in out_accum and lse_accum.
  __device__ __forceinline__ int64_t accum_row(const Arguments& a, int head, int query) const {
    return ((split * a.p.batch + b) * a.p.heads_q + head) * a.p.seqlen_q + query;
  }
};

}  // namespace cuda
}  // namespace fastattn
