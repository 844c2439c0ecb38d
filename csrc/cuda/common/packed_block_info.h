// Which rows and keys a block of a call with a cache works on. All query heads that share a key/value head read the
// same keys, so their rows lie in one tile: row r of a key/value head is query r / group of head r % group of its
// group.
#pragma once

#include "arguments.h"
#include "block_info.h"

namespace fastattn {
namespace cuda {

struct PackedTile {
  int64_t b;
  int head_kv, split;
  int group;          // query heads per key/value head
  int row, last_row;  // the first row, and the last that exists
  Visibility sees;
  // Some row sees each of the keys [first_key, end_key), and all rows see those in [whole_first, whole_last).
  int first_key, end_key, whole_first, whole_last;
  // Of the key/value head, in page 0 of the cache (of sequence 0, if it is contiguous); and the sequence's pages.
  const char *keys, *values;
  const int32_t* pages;

  PackedTile() = default;

  // Blocks are numbered by tiles first, which read the same keys, then splits, key/value heads and sequences.
  __device__ __forceinline__ PackedTile(const Arguments& a, int rows) {
    const Params& p = a.p;
    const int64_t tiles = packed_tiles(p, rows), index = blockIdx.x;
    row = static_cast<int>(index % tiles) * rows;
    split = static_cast<int>(index / tiles % a.splits);
    head_kv = static_cast<int>(index / tiles / a.splits % p.heads_kv);
    b = index / tiles / a.splits / p.heads_kv;
    group = static_cast<int>(p.heads_q / p.heads_kv);
    last_row = min(row + rows, static_cast<int>(p.seqlen_q) * group) - 1;
    sees = Visibility(p, sequence_of(p, b));
    const int first_query = query(row), last_query = query(last_row);
    first_key = sees.first(first_query);
    end_key = sees.last(last_query);
    whole_first = sees.first(last_query);
    whole_last = sees.last(first_query);
    keys = static_cast<const char*>(p.k.data) + head_kv * p.k.stride_h * 2;
    values = static_cast<const char*>(p.v.data) + head_kv * p.v.stride_h * 2;
    pages = p.block_table == nullptr ? nullptr : p.block_table + b * p.max_pages;
  }

  __device__ __forceinline__ bool exists(int r) const { return r <= last_row; }

  // Rows that do not exist count as the last one.
  __device__ __forceinline__ int query(int r) const { return min(r, last_row) / group; }
  __device__ __forceinline__ int head(int r) const { return head_kv * group + min(r, last_row) % group; }

  // Where this split's result of a row lies in part_out and part_lse.
  __device__ __forceinline__ int64_t part_row(const Arguments& a, int head, int query) const {
    return ((split * a.p.batch + b) * a.p.heads_q + head) * a.p.seqlen_q + query;
  }
};

}  // namespace cuda
}  // namespace fastattn
