// Blocks of keys: K and V as the matrix product reads them, straight from the caller's memory where it lies right.
#pragma once

#include "kernels.h"
#include "pack.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Keys of one block. k(n) are the words of key n along head_dim; v(w) the words that hold key w, or keys 2 w and 2 w +
// 1, along head_dim_v.
template <class E>
struct KeyBlock {
  const typename E::Word* k;
  int64_t k_stride;
  const typename E::Word* v;
  int64_t v_stride;
};

// Scratch for copies: k has kBlockKeys * words_of(head_dim) words, v kBlockKeys * head_dim_v.
template <class E>
struct BlockScratch {
  typename E::Word *k, *v;
};

inline bool in_one_page(const Params& p, int64_t n0, int keys) {
  return p.block_table == nullptr || n0 / p.page_size == (n0 + keys - 1) / p.page_size;
}

template <class V, class T>
KeyBlock<Single<V>> load_block(Single<V>, const T*, const Params& p, const Sequence& seq, int64_t b, int64_t head_kv,
                               int64_t n0, int keys, BlockScratch<Single<V>> scratch) {
  using S = typename V::Scalar;
  const bool together = in_one_page(p, n0, keys);
  KeyBlock<Single<V>> block;
  auto rows = [&](const View& view, int dim, S* copy, const S*& data, int64_t& stride) {
    if (sizeof(T) == sizeof(S) && together && view.stride_d == 1) {
      data = reinterpret_cast<const S*>(key_row<const T>(p, view, seq, b, head_kv, n0));
      stride = view.stride_s;
      return;
    }
    for (int n = 0; n < keys; ++n)
      copy_row<V>(key_row<const T>(p, view, seq, b, head_kv, n0 + n), view.stride_d, dim, copy + int64_t(n) * dim);
    data = copy;
    stride = dim;
  };
  rows(p.k, int(p.head_dim), scratch.k, block.k, block.k_stride);
  rows(p.v, int(p.head_dim_v), scratch.v, block.v, block.v_stride);
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

// Keys as pairs of neighbouring rows: words[key / 2][dim].
inline void interleave_keys(const Params& p, const View& view, int dim, const Sequence& seq, int64_t b, int64_t head_kv,
                            int64_t n0, int keys, uint32_t* words) {
  for (int n = 0; n < keys; n += 2) {
    const bf16* even = key_row<const bf16>(p, view, seq, b, head_kv, n0 + n);
    const bf16* odd = n + 1 < keys ? key_row<const bf16>(p, view, seq, b, head_kv, n0 + n + 1) : nullptr;
    interleave_rows(even, view.stride_d, odd, dim, words + n / 2 * int64_t(dim));
  }
}

inline KeyBlock<Pairs> load_block(Pairs, const bf16*, const Params& p, const Sequence& seq, int64_t b, int64_t head_kv,
                                  int64_t n0, int keys, BlockScratch<Pairs> scratch) {
  KeyBlock<Pairs> block{nullptr, 0, scratch.v, p.head_dim_v};
  load_pair_rows(p, p.k, int(p.head_dim), seq, b, head_kv, n0, keys, scratch.k, block.k, block.k_stride);
  interleave_keys(p, p.v, int(p.head_dim_v), seq, b, head_kv, n0, keys, scratch.v);
  return block;
}
#endif

// C[d][lane] gets the sum over keys of rows[key word][d] * words[key word][lane], for rows [key word][stride]. An odd
// number of keys leaves half a word, where the next key may lie, unseen and NaN: `copy` takes that word's row without
// it.
template <class E, int kVectors, Update kUpdate>
void gemm_over_keys(int dim, int keys, const typename E::Word* rows, int64_t stride, const typename E::Word* words,
                    typename E::Scalar* c, typename E::Word* copy, typename E::Scalar* lanes = nullptr) {
  const int whole = keys / E::kPerWord;
  gemm<E, kVectors, kUpdate>(dim, whole, rows, 1, stride, words, c, lanes);
  if constexpr (E::kPerWord == 2) {
    if (keys % 2 == 0) return;
    for (int d = 0; d < dim; ++d) copy[d] = rows[whole * stride + d] & 0xffffu;
    gemm<E, kVectors, Update::kAdd>(dim, 1, copy, 1, dim, words + whole * kLanesOf<typename E::Vector>, c);
  }
}

// A copy of rows of a block in which the keys that no row of the panel sees are zero: they may hold NaN, and 0 * NaN is
// NaN. `words` counts per row of v.
template <class E>
const typename E::Word* without_gaps(const typename E::Word* v, int64_t stride, int keys, int words,
                                     const uint8_t* seen, typename E::Word* copy) {
  for (int n = 0; n < keys; n += E::kPerWord) {
    for (int i = 0; i < words; ++i) {
      typename E::Word x = v[n / E::kPerWord * stride + i];
      if constexpr (E::kPerWord == 2) {
        if (!seen[n]) x &= 0xffff0000u;
        if (n + 1 < keys && !seen[n + 1]) x &= 0x0000ffffu;
      } else if (!seen[n]) {
        x = 0;
      }
      copy[n / E::kPerWord * int64_t(words) + i] = x;
    }
  }
  return copy;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
