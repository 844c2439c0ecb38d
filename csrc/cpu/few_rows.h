// Forward pass for few query rows, as in decoding: lanes are features, not queries.
//
// With fewer rows than lanes the products of forward.h would compute mostly padding, and would copy K and V that are
// not float32. Here each key's row is read once, as it lies (any page size, any dtype), dotted with all queries, and
// each value's row is added to all outputs. Cost per key and row: (head_dim + head_dim_v) / kWidth / kPerWord
// multiply-adds and 1 / kWidth of a transpose; bytes: each key and value once. Reading them bounds it.
#pragma once

#include "forward.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class V>
constexpr int kFewRows = V::kWidth < 8 ? V::kWidth : 8;

// Whether a job's sequence has few rows; not whether the job has, which depends on how the rows are shared out.
template <class V>
bool few_rows(const Params& p, const ForwardJob& job) {
  const int64_t rows = sequence_of(p, job.b).q_length * (p.heads_q / p.heads_kv);
  return rows <= kFewRows<V> && p.k.stride_d == 1 && p.v.stride_d == 1;
}

template <class E, class T>
struct FewRowsScratch {
  using S = typename E::Scalar;
  using Word = typename E::Word;
  static constexpr int kWidth = E::Vector::kWidth, kNumbers = kWidth * E::kPerWord;
  Word* queries;  // [row][words of dim, padded to whole vectors]
  S* acc;         // [row][dim_v padded to whole words of vectors]
  S *scores, *factors;
  Word* probs;
  const T **k, **v, **next_k;  // rows of the block's keys, and of the keys of the block after it
  T* rest;                     // [key][kNumbers]: the last features of values, where they are not whole vectors,
  const T** v_rest;            // and where each key's begin
  AddendScratch<typename E::Vector> addend;
  int query_words, dim_v;  // padded

  FewRowsScratch(const Params& p, Arena& arena) {
    constexpr int kRows = kFewRows<typename E::Vector>, kLanes = Panel<typename E::Vector>::kLanes;
    query_words = (words_of(int(p.head_dim), E::kPerWord) + kWidth - 1) / kWidth * kWidth;
    dim_v = int((p.head_dim_v + kNumbers - 1) / kNumbers * kNumbers);
    queries = arena.take<Word>(int64_t(kRows) * query_words);
    acc = arena.take<S>(int64_t(kRows) * dim_v);
    scores = arena.take<S>(kBlockKeys * kLanes);
    probs = E::kPerWord == 1 ? reinterpret_cast<Word*>(scores) : arena.take<Word>(kBlockKeys / 2 * kLanes);
    factors = arena.take<S>(p.dropout_threshold ? kBlockKeys * kLanes : 0);
    k = arena.take<const T*>(kBlockKeys);
    v = arena.take<const T*>(kBlockKeys);
    next_k = arena.take<const T*>(kBlockKeys);
    const bool whole = p.head_dim_v % kNumbers == 0;
    rest = arena.take<T>(whole ? 0 : kBlockKeys * kNumbers);
    v_rest = arena.take<const T*>(whole ? 0 : kBlockKeys);
    addend.values = arena.take<S>(kBlockKeys * kLanes);
    addend.seen = arena.take<uint8_t>(kBlockKeys);
  }
};

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
void few_scores_tile(const typename E::Word* queries, int ld, int dim, const T* const* k, int keys,
                     typename E::Scalar* scores) {
  using V = typename E::Vector;
  constexpr int kKeys = V::kWidth / kRows, kNumbers = V::kWidth * E::kPerWord;
  const int whole = dim / kNumbers * kNumbers;
  T rest[kKeys][kNumbers];
  for (int n = 0; n < kKeys && !kWhole; ++n) copy_part(k[n < keys ? n : 0] + whole, dim - whole, kNumbers, rest[n]);
  V acc[V::kWidth];  // in registers, as all loops over it are unrolled
#pragma GCC unroll 16
  for (int i = 0; i < V::kWidth; ++i) acc[i] = V::set(0);
  for (int d = 0; d < dim; d += kNumbers) {
    typename E::Operand q[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) q[r] = E::load(queries + r * ld + d / E::kPerWord);
#pragma GCC unroll 16
    for (int n = 0; n < kKeys; ++n) {
      const typename E::Operand key = RowOperands<E, T>::key(kWhole || d < whole ? k[n < keys ? n : 0] + d : rest[n]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[n * kRows + r] = E::multiply_add(key, q[r], acc[n * kRows + r]);
    }
  }
  typename V::Scalar sums[V::kWidth];
  sum_of_lanes(acc).store(sums);
  for (int n = 0; n < keys; ++n)
    for (int r = 0; r < kRows; ++r) scores[n * Panel<V>::kLanes + r] = sums[n * kRows + r];
}

// ahead: rows of ahead_dim numbers to ask for meanwhile, one per key; may be null.
template <class E, class T, int kRows>
void few_scores(const typename E::Word* queries, int ld, int dim, const T* const* k, int keys,
                typename E::Scalar* scores, const T* const* ahead, int ahead_dim) {
  constexpr int kKeys = E::Vector::kWidth / kRows;
  for (int n = 0; n < keys; n += kKeys) {
    const int some = int(smaller(kKeys, keys - n));
    for (int i = 0; i < some && ahead != nullptr; ++i) prefetch_row(ahead[n + i], ahead_dim);
    auto* to = scores + n * Panel<typename E::Vector>::kLanes;
    if (dim % (E::Vector::kWidth * E::kPerWord) == 0) {
      few_scores_tile<E, T, kRows, true>(queries, ld, dim, k + n, some, to);
    } else {
      few_scores_tile<E, T, kRows, false>(queries, ld, dim, k + n, some, to);
    }
  }
}

// acc[row][..] = alpha[row] * acc + sum over keys of probs[key word][row] * v[key][..], for kRows rows and kVectors
// vectors of features. seen: null, or 0 for keys that no row sees and whose memory may hold NaN.
template <class E, class T, int kRows, int kVectors>
void few_outputs_tile(const typename E::Word* probs, const T* const* v, int d, const uint8_t* seen, int keys,
                      const typename E::Scalar* alpha, typename E::Scalar* acc, int ld, const T* const* ahead,
                      int ahead_keys, int ahead_from, int ahead_dim) {
  using V = typename E::Vector;
  static const T kZeros[kVectors * V::kWidth] = {};
  V sum[kRows][kVectors];  // likewise; of 16 some do not fit AVX2's registers, which fewer at a time did not gain by
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sum[r][i] = V::set(0);
  for (int n = 0; n < keys; n += E::kPerWord) {
    for (int i = n; i < n + E::kPerWord && i < ahead_keys; ++i) prefetch_row(ahead[i] + ahead_from, ahead_dim);
    if (E::kPerWord == 1 && seen != nullptr && !seen[n]) continue;
    const T* rows[2] = {kZeros, kZeros};
    for (int i = 0; i < E::kPerWord; ++i)
      if (n + i < keys && (seen == nullptr || seen[n + i])) rows[i] = v[n + i] + d;
    typename E::Operand value[kVectors];
    RowOperands<E, T>::values(rows[0], rows[1], value);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const typename E::Operand prob = E::broadcast(probs + n / E::kPerWord * Panel<V>::kLanes + r);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) sum[r][i] = E::multiply_add(prob, value[i], sum[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      typename V::Scalar* to = acc + r * ld + i * V::kWidth;
      fma(V::set(alpha[r]), V::load(to), sum[r][i]).store(to);
    }
}

// The outputs of rows r .. r + kRows. next_keys: of the block after this one, whose rows are asked for meanwhile,
// evenly: what is asked for at once the processor may drop.
template <class E, class T, int kRows>
void few_outputs(const FewRowsScratch<E, T>& s, int r, const uint8_t* seen, int keys, int dim_v,
                 const typename E::Scalar* alpha, int dim, int next_keys) {
  constexpr int kWidth = E::Vector::kWidth, kLarge = kWidth >= 8 ? 4 : 2;
  int asked = 0;
  auto tile = [&](auto vectors, const T* const* rows, int first, int d) {
    constexpr int kTile = decltype(vectors)::value;
    const int until = int(smaller(dim_v, d + kTile * kWidth) * dim / dim_v);
    few_outputs_tile<E, T, kRows, kTile>(s.probs + r, rows, first, seen, keys, alpha + r, s.acc + r * s.dim_v + d,
                                         s.dim_v, s.next_k, next_keys, asked, until - asked);
    asked = until;
  };
  int d = 0;
  for (; d + kLarge * kWidth <= dim_v; d += kLarge * kWidth) tile(Constant<kLarge>{}, s.v, d, d);
  for (; d + E::kPerWord * kWidth <= dim_v; d += E::kPerWord * kWidth) tile(Constant<E::kPerWord>{}, s.v, d, d);
  if (d < dim_v) tile(Constant<E::kPerWord>{}, s.v_rest, 0, d);
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

template <class E, class T>
void few_rows_block(const Params& p, const Sequence& seq, const Panel<typename E::Vector>& panel, int64_t n0, int keys,
                    int next_keys, OnlineSoftmax<typename E::Vector>& state, FewRowsScratch<E, T>& s) {
  using V = typename E::Vector;
  const int dim = int(p.head_dim), dim_v = int(p.head_dim_v);
  const bool plain =
      can_be_plain(p) && !has_terms(p) && p.scale > 0 && panel.all.first <= n0 && n0 + keys <= panel.all.last;
  bool gaps = false;
  if (!plain && !make_addend(p, seq, panel, n0, keys, s.addend, gaps)) return;
  for_row_pieces<V>(panel.count, [&](auto rows, int r) {
    few_scores<E, T, decltype(rows)::value>(s.queries + r * s.query_words, s.query_words, dim, s.k, keys, s.scores + r,
                                            r == 0 ? s.v : nullptr, dim_v);
  });
  typename V::Scalar plain_max[Panel<V>::kLanes];
  if (plain) maximum<V, 1>(s.scores, keys, plain_max);
  softmax_step<E, 1>(p, panel, n0, keys, plain ? plain_max : nullptr, s.scores, s.addend.values, s.factors, s.probs,
                     state);
  const int whole = dim_v / s.kNumbers * s.kNumbers;
  for (int n = 0; n < keys && whole < dim_v; ++n) {
    s.v_rest[n] = s.rest + n * s.kNumbers;
    const bool seen = !gaps || s.addend.seen[n];
    copy_part(s.v[n] + whole, seen ? dim_v - whole : 0, s.kNumbers, s.rest + n * s.kNumbers);
  }
  for_row_pieces<V>(panel.count, [&](auto rows, int r) {
    few_outputs<E, T, decltype(rows)::value>(s, r, gaps ? s.addend.seen : nullptr, keys, dim_v, state.alpha, dim,
                                             r == 0 ? next_keys : 0);
  });
}

template <class E, class T>
void few_rows_job(const Params& p, const ForwardJob& job, const Parts& parts, void* memory) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  Arena arena(memory);
  FewRowsScratch<E, T> s(p, arena);
  const Sequence seq = sequence_of(p, job.b);
  Panel<V> panel;
  set_panel(panel, p, seq, job.b, group_of(p, job.head_kv), job.first_row, job.rows, job.keys);
  OnlineSoftmax<V> state;
  reset(state);
  for (int i = 0; i < panel.count * s.query_words; ++i) s.queries[i] = 0;
  for (int i = 0; i < panel.count * s.dim_v; ++i) s.acc[i] = S(0);
  for (int r = 0; r < panel.count; ++r) {
    if (panel.keys[r].first < panel.keys[r].last)
      RowOperands<E, T>::query(row_of<const T>(p.q, seq, job.b, panel.head[r], panel.query[r]), p.q.stride_d,
                               int(p.head_dim), s.queries + r * s.query_words);
  }
  auto find_keys = [&](int64_t n0, const T** rows) {
    const int keys = int(larger(0, smaller(kBlockKeys, panel.any.last - n0)));
    for (int n = 0; n < keys; ++n) rows[n] = key_row<const T>(p, p.k, seq, job.b, job.head_kv, n0 + n);
    return keys;
  };
  int keys = find_keys(panel.any.first, s.k);
  for (int64_t n0 = panel.any.first; n0 < panel.any.last; n0 += kBlockKeys) {
    for (int n = 0; n < keys; ++n) s.v[n] = key_row<const T>(p, p.v, seq, job.b, job.head_kv, n0 + n);
    const int next_keys = find_keys(n0 + kBlockKeys, s.next_k);
    few_rows_block(p, seq, panel, n0, keys, next_keys, state, s);
    const T** used = s.k;
    s.k = s.next_k;
    s.next_k = used;
    keys = next_keys;
  }
  S inverse[Panel<V>::kLanes], lse[Panel<V>::kLanes];
  finish_softmax(p, panel, job, state, inverse, lse);
  for (int r = 0; r < panel.count; ++r) {
    const V factor = V::set(inverse[r]), zero = V::set(S(0));
    S* acc = s.acc + r * s.dim_v;
    for (int d = 0; d < s.dim_v; d += V::kWidth)
      select(equal(factor, zero), zero, V::load(acc + d) * factor).store(acc + d);
    if (job.part >= 0) {
      store_row<V>(acc, int(p.head_dim_v), part_row<S>(p, job, parts, r), 1);
    } else {
      store_row<V>(acc, int(p.head_dim_v), row_of<T>(p.out, seq, job.b, panel.head[r], panel.query[r]), p.out.stride_d);
      if (p.out_low.data == nullptr) continue;
      for (int d = 0; d < s.dim_v; d += V::kWidth) low_part<T>(V::load(acc + d)).store(acc + d);
      store_row<V>(acc, int(p.head_dim_v), row_of<T>(p.out_low, seq, job.b, panel.head[r], panel.query[r]),
                   p.out_low.stride_d);
    }
  }
  store_lse(p, seq, panel, job, parts, 0, lse);
}

template <class E>
size_t few_rows_scratch(const Params& p) {
  Arena arena(nullptr);
  FewRowsScratch<E, typename E::Scalar> scratch(p, arena);
  return arena.used();
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
