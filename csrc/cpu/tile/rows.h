// Where the rows of the caller's tensors begin.
#pragma once

#include "../../call/params.h"

namespace fastattn {
namespace FASTATTN_ISA {

// A key/value head of a sequence: what blocks of K and V are read from.
struct KVHead {
  const Params& p;
  const Sequence& seq;
  int64_t b, head_kv;
};

// The first element of a query row of q, out or a gradient of theirs.
template <class T>
T* row_of(const View& view, const Sequence& seq, int64_t b, int64_t head, int64_t query) {
  return static_cast<T*>(view.data) + b * view.stride_b + head * view.stride_h + (seq.q_begin + query) * view.stride_s;
}

// The first element of key j's row in k, v or a gradient of theirs, through the block table if there is one.
template <class T>
T* key_row(const KVHead& kv, const View& view, int64_t j) {
  const Params& p = kv.p;
  T* data = static_cast<T*>(view.data) + kv.head_kv * view.stride_h;
  if (p.block_table == nullptr) return data + kv.b * view.stride_b + (kv.seq.k_begin + j) * view.stride_s;
  return data + int64_t(p.block_table[kv.b * p.max_pages + j / p.page_size]) * view.stride_b +
         j % p.page_size * view.stride_s;
}

// Fetches a row that will be read soon. Keys and values come in turns, a block of each. Without this the memory rests
// while the processor computes, and the processor waits whenever it changes from one to the other.
template <class T>
inline void prefetch_row(const T* row, int dim) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < int64_t(dim) * int64_t(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
