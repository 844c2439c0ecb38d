// The products of the decode kernel: lanes are features, not queries. The backward pass recomputes its scores by them.
//
// A score is a dot product of two rows, and whole tiles of them are summed over their lanes together. Outputs add up
// the rows of four values at a time.
#pragma once

#include "mask.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The most rows, over all heads of a group, of a sequence that the decode kernel computes.
template <class V>
constexpr int kDecodeRows = V::kWidth < 8 ? V::kWidth : 8;

// Whether the decode kernel computes a sequence. The rows of the sequence decide, not those of a job, which depend on
// the number of threads.
template <class V>
bool is_decode(const Params& p, const Sequence& seq) {
  const int64_t rows = seq.q_length * (p.heads_q / p.heads_kv);
  return rows <= kDecodeRows<V> && p.k.stride_d == 1 && p.v.stride_d == 1;
}

// Words of a query, padded to whole vectors.
template <class E>
int decode_query_words(const Params& p) {
  constexpr int kWidth = E::Vector::kWidth;
  return (words_of(int(p.head_dim), E::kPerWord) + kWidth - 1) / kWidth * kWidth;
}

// How rows become operands. A word holds kPerWord numbers: of a key, neighbours in its row; of values, the same feature
// of neighbouring keys.
template <class E, class T>
struct RowOperands;

template <class V, class T>
struct RowOperands<Single<V>, T> {
  static void query(const T* row, int64_t stride, int dim, typename V::Scalar* words) {
    copy_row<V>(row, stride, dim, words);
  }
  static V key(const T* row) { return V::load(row); }
  // kVectors * kWidth features of a key.
  template <int kVectors>
  static void values(const T* row, const T*, V (&out)[kVectors]) {
    for (int i = 0; i < kVectors; ++i) out[i] = V::load(row + i * V::kWidth);
  }
};

#ifdef __AVX512BF16__
template <>
struct RowOperands<Pairs, bf16> {
  static void query(const bf16* row, int64_t stride, int dim, uint32_t* words) { pair_row(row, stride, dim, words); }
  static BF16Pairs key(const bf16* row) { return BF16Pairs::load(reinterpret_cast<const uint32_t*>(row)); }
  template <int kVectors>
  static void values(const bf16* even, const bf16* odd, BF16Pairs (&out)[kVectors]) {
    static_assert(kVectors % 2 == 0);
    for (int i = 0; i < kVectors; i += 2) interleave(even + i * F32::kWidth, odd + i * F32::kWidth, out[i], out[i + 1]);
  }
};
#endif

// scores[key][row] of kRows queries and kWidth / kRows keys. kWhole: dim is made of whole vectors.
template <class E, class T, int kRows, bool kWhole>
void decode_scores_tile(const typename E::Word* queries, int ld, int dim, const T* const* k, int keys,
                        typename E::Scalar* scores) {
  using V = typename E::Vector;
  constexpr int kKeys = V::kWidth / kRows, kElements = V::kWidth * E::kPerWord;
  const int whole = dim / kElements * kElements;
  T rest[kKeys][kElements];
  for (int n = 0; n < kKeys && !kWhole; ++n) copy_padded(k[n < keys ? n : 0] + whole, dim - whole, kElements, rest[n]);
  V acc[V::kWidth];  // in registers, as all loops over it are unrolled
#pragma GCC unroll 16
  for (int i = 0; i < V::kWidth; ++i) acc[i] = V::set(0);
  constexpr int kTogether = kKeys < 2 ? 1 : 2;
#pragma GCC unroll 16
  for (int n = 0; n < kKeys; n += kTogether) {
    for (int d = 0; d < dim; d += kElements) {
      typename E::Operand q[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) q[r] = E::load(queries + r * ld + d / E::kPerWord);
#pragma GCC unroll 2
      for (int i = n; i < n + kTogether; ++i) {
        const T* row = kWhole || d < whole ? k[i < keys ? i : 0] + d : rest[i];
        const typename E::Operand key = RowOperands<E, T>::key(row);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[i * kRows + r] = E::multiply_add(key, q[r], acc[i * kRows + r]);
      }
    }
  }
  typename V::Scalar sums[V::kWidth];
  sum_of_lanes(acc).store(sums);
  for (int n = 0; n < keys; ++n)
    for (int r = 0; r < kRows; ++r) scores[n * Panel<V>::kLanes + r] = sums[n * kRows + r];
}

// Calls f(count, first) for pieces of 4, 2 and 1 rows; count is a constant.
template <class V, class F>
void for_row_pieces(int rows, F f) {
  int r = 0;
  if constexpr (V::kWidth >= 4) {
    for (; r + 4 <= rows; r += 4) f(Constant<4>{}, r);
  }
  for (; r + 2 <= rows; r += 2) f(Constant<2>{}, r);
  if (r < rows) f(Constant<1>{}, r);
}

// Queries as decode_scores reads them: [row][ld words], zeros where a row sees nothing.
template <class E>
struct DecodeQueries {
  const typename E::Word* words;
  int rows, ld, dim;
};

// Rows of keys or values, by pointers: with pages, and whatever their stride.
template <class T>
struct RowPointers {
  const T* const* rows;  // null: none
  int dim;
};

template <class E, class T, int kRows>
void decode_scores_piece(const DecodeQueries<E>& q, int first_row, const T* const* k, int keys,
                         typename E::Scalar* scores, RowPointers<T> next) {
  constexpr int kKeys = E::Vector::kWidth / kRows;
  const typename E::Word* queries = q.words + first_row * q.ld;
  for (int n = 0; n < keys; n += kKeys) {
    const int some = int(smaller(kKeys, keys - n));
    for (int i = 0; i < some && next.rows != nullptr; ++i) prefetch_row(next.rows[n + i], next.dim);
    auto* to = scores + n * Panel<typename E::Vector>::kLanes + first_row;
    if (q.dim % (E::Vector::kWidth * E::kPerWord) == 0) {
      decode_scores_tile<E, T, kRows, true>(queries, q.ld, q.dim, k + n, some, to);
    } else {
      decode_scores_tile<E, T, kRows, false>(queries, q.ld, q.dim, k + n, some, to);
    }
  }
}

// scores[key][row] of queries and the rows k of keys. A score has the same bits whatever else is computed with it: the
// backward pass computes it again among others. next: one row per key to prefetch meanwhile.
template <class E, class T>
void decode_scores(const DecodeQueries<E>& q, const T* const* k, int keys, typename E::Scalar* scores,
                   RowPointers<T> next) {
  for_row_pieces<typename E::Vector>(q.rows, [&](auto count, int r) {
    const RowPointers<T> first_only = r == 0 ? next : RowPointers<T>{nullptr, 0};
    decode_scores_piece<E, T, decltype(count)::value>(q, r, k, keys, scores, first_only);
  });
}

// Loads the queries of a panel.
template <class E, class T>
void load_decode_queries(const KVHead& kv, const MaskedPanel<typename E::Vector>& panel, int ld,
                         typename E::Word* queries) {
  for (int i = 0; i < panel.count * ld; ++i) queries[i] = 0;
  for (int r = 0; r < panel.count; ++r) {
    if (panel.mask.sees_keys(r))
      RowOperands<E, T>::query(panel_row<const T>(kv.p.q, kv.seq, panel, r), kv.p.q.stride_d, int(kv.p.head_dim),
                               queries + r * ld);
  }
}

// sums[row][d] (+)= the sum over four keys of probs[key word][row] * v[key][d], for kRows rows and `dim` features:
// whole words of vectors.
template <class E, class T, int kRows, bool kBegins>
void decode_outputs_tile(const typename E::Word* probs, const T* const (&v)[4], int dim, typename E::Scalar* sums,
                         int ld) {
  using V = typename E::Vector;
  constexpr int kVectors = E::kPerWord, kWords = 4 / E::kPerWord;
  typename E::Operand prob[kWords][kRows];
#pragma GCC unroll 4
  for (int w = 0; w < kWords; ++w)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) prob[w][r] = E::broadcast(probs + w * Panel<V>::kLanes + r);
  for (int d = 0; d < dim; d += kVectors * V::kWidth) {
    typename E::Operand value[kWords][kVectors];
#pragma GCC unroll 4
    for (int w = 0; w < kWords; ++w)
      RowOperands<E, T>::values(v[w * E::kPerWord] + d, v[w * E::kPerWord + E::kPerWord - 1] + d, value[w]);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) {
        typename V::Scalar* to = sums + r * ld + d + i * V::kWidth;
        V sum = kBegins ? V::set(0) : V::load(to);
#pragma GCC unroll 4
        for (int w = 0; w < kWords; ++w) sum = E::multiply_add(prob[w][r], value[w][i], sum);
        sum.store(to);
      }
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
