// Which rows a block of threads works on, and which keys they see. Positions are 32-bit: the host refuses longer calls.
#pragma once

#include "../../call/params.h"
#include "grid.h"

namespace fastattn {
namespace cuda {

constexpr int kOpen = 1 << 29;  // a side of a window that ends nowhere; positions stay below 1 << 28

// Which keys the queries of a sequence see: [first(i), last(i)) for query i.
struct Visibility {
  int offset, left, right, k_length;

  Visibility() = default;
  __device__ __forceinline__ Visibility(const Params& p, const Sequence& s)
      : offset(static_cast<int>(s.offset)),
        left(p.window_left < 0 || p.window_left > kOpen ? kOpen : static_cast<int>(p.window_left)),
        right(p.window_right < 0 || p.window_right > kOpen ? kOpen : static_cast<int>(p.window_right)),
        k_length(static_cast<int>(s.k_length)) {}

  __device__ __forceinline__ int first(int i) const { return max(i + offset - left, 0); }
  __device__ __forceinline__ int last(int i) const { return min(i + offset + right + 1, k_length); }

  // The queries that see key j are [first_query(j), last_query(j)), within the sequence.
  __device__ __forceinline__ int first_query(int j) const { return max(j - offset - right, 0); }
  __device__ __forceinline__ int last_query(int j, int q_length) const { return min(j - offset + left + 1, q_length); }
};

// What one block of threads works on. Blocks are numbered by tiles first, then heads, then sequences; in a varlen call
// tiles are counted over all sequences.
struct Tile {
  int64_t b;
  int head;
  int row;       // first row, within the sequence
  int last_row;  // the last that exists, or below `row`: there is none
  Sequence sequence;
  Visibility sees;
  int group;  // heads of queries per head of keys
  // Queries see keys, and keys are seen by queries: these are the columns. Some row has each of [first, end), and all
  // rows have those in [whole_first, whole_end).
  int first, end, whole_first, whole_end;
  View keys, values;  // those of the call, for copies that read strides here (see arch.h)
};

// Sequence b of a varlen call owns the tiles from cu_seqlens[b] / rows + b on, which are at least as many as it needs:
// a block finds its sequence by bisection, and the host need not know the lengths.
__device__ __forceinline__ int64_t tile_owner(const int32_t* cu_seqlens, int64_t batch, int rows, int tile) {
  int64_t low = 0, high = batch;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (cu_seqlens[middle] / rows + middle <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The tile of this block, of kRows queries or, for the gradients of keys, of kRows keys.
template <int kRows, bool kOfKeys = false>
__device__ __forceinline__ Tile this_tile(const Params& p) {
  const int32_t* cu_seqlens = kOfKeys ? p.cu_seqlens_k : p.cu_seqlens_q;
  const int64_t total = kOfKeys ? p.seqlen_k : p.seqlen_q, heads = kOfKeys ? p.heads_kv : p.heads_q;
  const int count = static_cast<int>(tiles(total, p.batch, cu_seqlens != nullptr, kRows));
  // The last queries of a causal call see the most keys, and the first keys are seen by the most queries: these start
  // first.
  const int64_t index = blockIdx.x;
  int number = static_cast<int>(kOfKeys ? index % count : count - 1 - index % count);
  Tile tile;
  tile.head = static_cast<int>(index / count % heads);
  tile.b = index / count / heads;
  if (cu_seqlens != nullptr) {
    tile.b = tile_owner(cu_seqlens, p.batch, kRows, number);
    number -= static_cast<int>(bounded(cu_seqlens[tile.b], total) / kRows + tile.b);
  }
  tile.row = number * kRows;
  tile.sequence = sequence_of(p, tile.b);
  tile.sees = Visibility(p, tile.sequence);
  const int64_t length = kOfKeys ? tile.sequence.k_length : tile.sequence.q_length;
  // Wrong cu_seqlens may lead to a tile before the first row.
  tile.last_row =
      tile.row < 0 ? tile.row - 1 : static_cast<int>(tile.row + kRows < length ? tile.row + kRows : length) - 1;
  tile.group = static_cast<int>(p.heads_q / p.heads_kv);
  const Visibility& sees = tile.sees;
  const int q_length = static_cast<int>(tile.sequence.q_length);
  tile.first = kOfKeys ? sees.first_query(tile.row) : sees.first(tile.row);
  tile.end = kOfKeys ? sees.last_query(tile.last_row, q_length) : sees.last(tile.last_row);
  tile.whole_first = kOfKeys ? sees.first_query(tile.last_row) : sees.first(tile.last_row);
  tile.whole_end = kOfKeys ? sees.last_query(tile.row, q_length) : sees.last(tile.row);
  tile.keys = p.k;
  tile.values = p.v;
  return tile;
}

}  // namespace cuda
}  // namespace fastattn
