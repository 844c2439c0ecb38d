// Which rows a block of threads works on, and which columns they see. Positions are 32-bit: the host refuses longer
// calls.
#pragma once

#include "../../call/params.h"
#include "grid.h"
#include "mask.h"

namespace fastattn {
namespace cuda {

// Blocks are numbered by tiles first, then heads, then sequences. In a varlen call tiles are counted over all
// sequences.
struct BlockInfo {
  int64_t b;
  int head;
  int first_row;  // within the sequence
  int last_row;   // the last that exists; below first_row if none does
  Sequence sequence;
  Mask mask;
  int group;  // query heads per key/value head
  ColumnRange columns;
  View k, v;  // those of the call, for copies that read strides here (see ArchTraits)
};

// Sequence b of a varlen call owns the tiles from cu_seqlens[b] / rows + b on, which are at least as many as it needs.
// A block finds its sequence by bisection; the host need not know the lengths.
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

// The info of this block, which owns kBlockRows rows.
template <int kBlockRows, Rows kRows>
__device__ __forceinline__ BlockInfo block_info(const Params& p) {
  constexpr bool kOfKeys = kRows == Rows::kKeys;
  const int32_t* cu_seqlens = kOfKeys ? p.cu_seqlens_k : p.cu_seqlens_q;
  const int64_t total = kOfKeys ? p.seqlen_k : p.seqlen_q, heads = kOfKeys ? p.heads_kv : p.heads_q;
  const int count = static_cast<int>(tiles(total, p.batch, cu_seqlens != nullptr, kBlockRows));
  // The longest tiles start first: the last queries of a causal call see the most keys, and its first keys are seen by
  // the most queries.
  const int64_t index = blockIdx.x;
  int number = static_cast<int>(kOfKeys ? index % count : count - 1 - index % count);
  BlockInfo info;
  info.head = static_cast<int>(index / count % heads);
  info.b = index / count / heads;
  if (cu_seqlens != nullptr) {
    info.b = tile_owner(cu_seqlens, p.batch, kBlockRows, number);
    number -= static_cast<int>(bounded(cu_seqlens[info.b], total) / kBlockRows + info.b);
  }
  info.first_row = number * kBlockRows;
  info.sequence = sequence_of(p, info.b);
  info.mask = Mask(p, info.sequence);
  const int64_t length = kOfKeys ? info.sequence.k_length : info.sequence.q_length;
  // Wrong cu_seqlens may lead to a tile before the first row.
  info.last_row =
      info.first_row < 0
          ? info.first_row - 1
          : static_cast<int>(info.first_row + kBlockRows < length ? info.first_row + kBlockRows : length) - 1;
  info.group = static_cast<int>(p.heads_q / p.heads_kv);
  const int seqlen_q = static_cast<int>(info.sequence.q_length);
  info.columns = info.mask.columns<kRows>(info.first_row, info.last_row, seqlen_q);
  info.k = p.k;
  info.v = p.v;
  return info;
}

}  // namespace cuda
}  // namespace fastattn
