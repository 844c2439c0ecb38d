// Blocks of keys: K and V as the matrix product reads them, straight from the caller's memory where it lies right.
#pragma once

#include "../kernels/table.h"
#include "pack.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Keys of one block: the words of key n along head_dim at k + n * k_stride; v along head_dim_v, whose words k hold key
// k, or keys 2 k and 2 k + 1.
template <class E>
struct KeyBlock {
  const typename E::Word* k;
  int64_t k_stride;
  ColumnTiles<E> v;
};

// Scratch for copies: k has kBlockKeys * words_of(head_dim) words, v tiles_size<E>(head_dim_v).
template <class E>
struct BlockScratch {
  typename E::Word *k, *v;
};

// From tile to tile in copies of a block; a cache line more than a tile has, as all are written side by side.
template <class E>
constexpr int64_t kTileStride =
    kBlockKeys / E::kPerWord * ColumnTiles<E>::kRows + 64 / int64_t(sizeof(typename E::Word));

template <class E>
int64_t tiles_size(int64_t dim) {
  return (dim + ColumnTiles<E>::kRows - 1) / ColumnTiles<E>::kRows * kTileStride<E>;
}

// Columns of rows [key][dim] that `panels` panels will read: in place, or a copy in tiles if so many repay it.
template <class E>
ColumnTiles<E> columns_of(const typename E::Word* rows, int64_t stride, int keys, int dim, int64_t panels,
                          typename E::Word* copy) {
  constexpr int kRows = ColumnTiles<E>::kRows;
  if (panels < 4) return ColumnTiles<E>::of_rows(rows, stride);
  for (int n = 0; n < keys; ++n) {
    const typename E::Word* from = rows + n * stride;
    typename E::Word* to = copy + n * kRows;
    int d = 0;
    for (; d + kRows <= dim; d += kRows, to += kTileStride<E>) std::memcpy(to, from + d, kRows * sizeof(*to));
    for (int i = 0; d + i < dim; ++i) to[i] = from[d + i];
  }
  return {copy, kRows, kTileStride<E>};
}

inline bool in_one_page(const Params& p, int64_t n0, int keys) {
  return p.block_table == nullptr || n0 / p.page_size == (n0 + keys - 1) / p.page_size;
}

// Keys as rows of numbers, in place if they lie right.
template <class V, class T>
void load_rows(const Params& p, const View& view, int dim, const Sequence& seq, int64_t b, int64_t head_kv, int64_t n0,
               int keys, typename V::Scalar* copy, const typename V::Scalar*& rows, int64_t& stride) {
  using S = typename V::Scalar;
  if (sizeof(T) == sizeof(S) && view.stride_d == 1 && in_one_page(p, n0, keys)) {
    rows = reinterpret_cast<const S*>(key_row<const T>(p, view, seq, b, head_kv, n0));
    stride = view.stride_s;
    return;
  }
  for (int n = 0; n < keys; ++n)
    copy_row<V>(key_row<const T>(p, view, seq, b, head_kv, n0 + n), view.stride_d, dim, copy + int64_t(n) * dim);
  rows = copy;
  stride = dim;
}

// panels: how many will read the block.
template <class V, class T>
KeyBlock<Single<V>> load_block(Single<V>, const T*, const Params& p, const Sequence& seq, int64_t b, int64_t head_kv,
                               int64_t n0, int keys, int64_t panels, BlockScratch<Single<V>> scratch) {
  using E = Single<V>;
  const int dim = int(p.head_dim_v);
  KeyBlock<E> block;
  load_rows<V, T>(p, p.k, int(p.head_dim), seq, b, head_kv, n0, keys, scratch.k, block.k, block.k_stride);
  const typename E::Word* v;
  int64_t stride;
  load_rows<V, T>(p, p.v, dim, seq, b, head_kv, n0, keys, scratch.v, v, stride);
  // A second copy would not be repaid.
  block.v =
      v == scratch.v ? ColumnTiles<E>::of_rows(v, stride) : columns_of<E>(v, stride, keys, dim, panels, scratch.v);
  return block;
}

#ifdef __AVX512BF16__
// Keys as pairs along the row, in place if the rows begin at whole words.
inline void load_pair_rows(const Params& p, const View& view, int dim, const Sequence& seq, int64_t b, int64_t head_kv,
                           int64_t n0, int keys, uint32_t* copy, const uint32_t*& words, int64_t& stride) {
  if (in_one_page(p, n0, keys) && view.stride_d == 1 && view.stride_s % 2 == 0 && dim % 2 == 0) {
    words = reinterpret_cast<const uint32_t*>(key_row<const bf16>(p, view, seq, b, head_kv, n0));
    stride = view.stride_s / 2;
    return;
  }
  words = copy;
  stride = words_of(dim, 2);
  for (int n = 0; n < keys; ++n)
    pair_row(key_row<const bf16>(p, view, seq, b, head_kv, n0 + n), view.stride_d, dim, copy + n * stride);
}

// Keys as pairs of neighbouring rows.
inline ColumnTiles<Pairs> interleave_keys(const Params& p, const View& view, int dim, const Sequence& seq, int64_t b,
                                          int64_t head_kv, int64_t n0, int keys, uint32_t* words) {
  for (int n = 0; n < keys; n += 2) {
    const bf16* even = key_row<const bf16>(p, view, seq, b, head_kv, n0 + n);
    const bf16* odd = n + 1 < keys ? key_row<const bf16>(p, view, seq, b, head_kv, n0 + n + 1) : nullptr;
    interleave_rows(even, view.stride_d, odd, dim, words + n / 2 * int64_t(dim));
  }
  return ColumnTiles<Pairs>::of_rows(words, dim);
}

inline KeyBlock<Pairs> load_block(Pairs, const bf16*, const Params& p, const Sequence& seq, int64_t b, int64_t head_kv,
                                  int64_t n0, int keys, int64_t, BlockScratch<Pairs> scratch) {
  KeyBlock<Pairs> block;
  load_pair_rows(p, p.k, int(p.head_dim), seq, b, head_kv, n0, keys, scratch.k, block.k, block.k_stride);
  block.v = interleave_keys(p, p.v, int(p.head_dim_v), seq, b, head_kv, n0, keys, scratch.v);
  return block;
}
#endif

// C[d][lane] gets the sum over keys of a(d, key word) * words[key word][lane]. An odd number of keys leaves half a
// word, where the next key may lie, unseen and NaN: `copy` takes that word's row without it.
template <class E, int kVectors, Update kUpdate>
void gemm_over_keys(int dim, int keys, const ColumnTiles<E>& a, const typename E::Word* words, typename E::Scalar* c,
                    typename E::Word* copy, typename E::Scalar* lanes = nullptr) {
  const int whole = keys / E::kPerWord;
  gemm_columns<E, kVectors, kUpdate>(dim, whole, a, words, c, lanes);
  if constexpr (E::kPerWord == 2) {
    if (keys % 2 == 0) return;
    for (int d = 0; d < dim; ++d) copy[d] = *a.at(d, whole) & 0xffffu;
    gemm_columns<E, kVectors, Update::kAdd>(dim, 1, ColumnTiles<E>::of_rows(copy, dim),
                                            words + whole * kLanesOf<typename E::Vector>, c);
  }
}

// A copy of rows of a block in which the keys that no row of the panel sees are zero: they may hold NaN, and 0 * NaN is
// NaN.
template <class E>
ColumnTiles<E> without_gaps(const ColumnTiles<E>& a, int keys, int dim, const uint8_t* seen, typename E::Word* copy) {
  for (int n = 0; n < keys; n += E::kPerWord) {
    for (int d = 0; d < dim; ++d) {
      typename E::Word x = *a.at(d, n / E::kPerWord);
      if constexpr (E::kPerWord == 2) {
        if (!seen[n]) x &= 0xffff0000u;
        if (n + 1 < keys && !seen[n + 1]) x &= 0x0000ffffu;
      } else if (!seen[n]) {
        x = 0;
      }
      copy[n / E::kPerWord * int64_t(dim) + d] = x;
    }
  }
  return ColumnTiles<E>::of_rows(copy, dim);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
