// Blocks of keys: K and V as the matrix product reads them, in place in the caller's memory where its layout allows.
#pragma once

#include "../jobs.h"
#include "mask.h"
#include "pack.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Rows of words along head_dim or head_dim_v, one per key.
template <class E>
struct KeyRows {
  const typename E::Word* data;
  int64_t stride;
  KeyRows from(int64_t key) const { return {data + key * stride, stride}; }
};

// One block of the forward pass. Word k of v holds key k, or keys 2 k and 2 k + 1.
template <class E>
struct KeyBlock {
  int64_t n_begin;
  KeyRows<E> k;
  ColumnTiles<E> v;
};

// Scratch for copies: k has kBlockN * words_of(head_dim) words, v tiles_size<E>(head_dim_v).
template <class E>
struct BlockScratch {
  typename E::Word *k, *v;
};

// From tile to tile in copies of a block; a cache line more than a tile has, as all are written side by side.
template <class E>
constexpr int64_t kTileStride = kBlockN / E::kPerWord * ColumnTiles<E>::kRows + 64 / int64_t(sizeof(typename E::Word));

template <class E>
int64_t tiles_size(int64_t dim) {
  return (dim + ColumnTiles<E>::kRows - 1) / ColumnTiles<E>::kRows * kTileStride<E>;
}

// Columns of rows [key][dim] that `panels` panels will read: in place, or a copy in tiles if so many repay it.
template <class E>
ColumnTiles<E> columns_of(KeyRows<E> rows, int keys, int dim, int64_t panels, typename E::Word* copy) {
  constexpr int kRows = ColumnTiles<E>::kRows;
  if (panels < 4) return ColumnTiles<E>::of_rows(rows.data, rows.stride);
  for (int n = 0; n < keys; ++n) {
    const typename E::Word* from = rows.data + n * rows.stride;
    typename E::Word* to = copy + n * kRows;
    int d = 0;
    for (; d + kRows <= dim; d += kRows, to += kTileStride<E>) std::memcpy(to, from + d, kRows * sizeof(*to));
    for (int i = 0; d + i < dim; ++i) to[i] = from[d + i];
  }
  return {copy, kRows, kTileStride<E>};
}

inline bool in_one_page(const Params& p, KeyTile tile) {
  return p.block_table == nullptr || tile.n_begin / p.page_size == (tile.n_end() - 1) / p.page_size;
}

// Keys as rows of numbers: in place, or in `copy`.
template <class V, class T>
KeyRows<Single<V>> load_rows(const KVHead& kv, const View& view, int dim, KeyTile tile, typename V::Scalar* copy) {
  using S = typename V::Scalar;
  if (sizeof(T) == sizeof(S) && view.stride_d == 1 && in_one_page(kv.p, tile))
    return {reinterpret_cast<const S*>(key_row<const T>(kv, view, tile.n_begin)), view.stride_s};
  for (int n = 0; n < tile.count; ++n)
    copy_row<V>(key_row<const T>(kv, view, tile.n_begin + n), view.stride_d, dim, copy + int64_t(n) * dim);
  return {copy, dim};
}

// panels: how many will read the block. The pointer tells the element type.
template <class V, class T>
KeyBlock<Single<V>> load_block(const T*, const KVHead& kv, KeyTile tile, int64_t panels,
                               BlockScratch<Single<V>> scratch) {
  using E = Single<V>;
  const int dim_v = int(kv.p.head_dim_v);
  KeyBlock<E> block;
  block.n_begin = tile.n_begin;
  block.k = load_rows<V, T>(kv, kv.p.k, int(kv.p.head_dim), tile, scratch.k);
  const KeyRows<E> v = load_rows<V, T>(kv, kv.p.v, dim_v, tile, scratch.v);
  // A second copy would not be repaid.
  block.v = v.data == scratch.v ? ColumnTiles<E>::of_rows(v.data, v.stride)
                                : columns_of<E>(v, tile.count, dim_v, panels, scratch.v);
  return block;
}

#ifdef __AVX512BF16__
// Keys as pairs along the row: in place if the rows begin at whole words, or in `copy`.
inline KeyRows<Pairs> load_pair_rows(const KVHead& kv, const View& view, int dim, KeyTile tile, uint32_t* copy) {
  if (in_one_page(kv.p, tile) && view.stride_d == 1 && view.stride_s % 2 == 0 && dim % 2 == 0)
    return {reinterpret_cast<const uint32_t*>(key_row<const bf16>(kv, view, tile.n_begin)), view.stride_s / 2};
  const int64_t stride = words_of(dim, 2);
  for (int n = 0; n < tile.count; ++n)
    pair_row(key_row<const bf16>(kv, view, tile.n_begin + n), view.stride_d, dim, copy + n * stride);
  return {copy, stride};
}

// Keys as pairs of neighbouring rows.
inline ColumnTiles<Pairs> interleave_keys(const KVHead& kv, const View& view, int dim, KeyTile tile, uint32_t* words) {
  for (int n = 0; n < tile.count; n += 2) {
    const bf16* even = key_row<const bf16>(kv, view, tile.n_begin + n);
    const bf16* odd = n + 1 < tile.count ? key_row<const bf16>(kv, view, tile.n_begin + n + 1) : nullptr;
    interleave_rows(even, view.stride_d, odd, dim, words + n / 2 * int64_t(dim));
  }
  return ColumnTiles<Pairs>::of_rows(words, dim);
}

inline KeyBlock<Pairs> load_block(const bf16*, const KVHead& kv, KeyTile tile, int64_t, BlockScratch<Pairs> scratch) {
  return {tile.n_begin, load_pair_rows(kv, kv.p.k, int(kv.p.head_dim), tile, scratch.k),
          interleave_keys(kv, kv.p.v, int(kv.p.head_dim_v), tile, scratch.v)};
}
#endif

// C[d][lane] gets the sum over keys of a(d, key word) * words[key word][lane]. An odd number of keys leaves half a
// word. The next key may lie there, unseen and NaN: `copy` gets that word's row without it.
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
