// Forward pass for few query rows, as in decoding: lanes are features, not queries.
//
// With fewer rows than lanes the products of forward.h would compute mostly padding, and would copy K and V that are
// not float32. Here each key's row is read once, as it lies (any page size, any dtype), dotted with all queries, and
// each value's row is added to all outputs. Cost per key and row: (head_dim + head_dim_v) / kWidth / kPerWord
// multiply-adds and 1 / kWidth of a transpose; bytes: each key and value once. Reading them bounds it, so they are read
// in the order in which they lie, whole rows, few side by side: with eight, or a part of each row at a time, a Zen 3
// core read two thirds as fast from memory.
#pragma once

#include "forward.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class V>
constexpr int kFewRows = V::kWidth < 8 ? V::kWidth : 8;

// Keys of one step. Values are asked for while its keys are read, and the next keys while its values are: so far ahead,
// and no further, memory keeps up.
constexpr int kFewKeys = 64;

// Whether a sequence has few rows; not whether a job has, which depends on how the rows are shared out.
template <class V>
bool few_rows(const Params& p, const Sequence& seq) {
  const int64_t rows = seq.q_length * (p.heads_q / p.heads_kv);
  return rows <= kFewRows<V> && p.k.stride_d == 1 && p.v.stride_d == 1;
}

// Words of a query, padded to whole vectors.
template <class E>
int few_query_words(const Params& p) {
  constexpr int kWidth = E::Vector::kWidth;
  return (words_of(int(p.head_dim), E::kPerWord) + kWidth - 1) / kWidth * kWidth;
}

template <class E, class T>
struct FewRowsScratch {
  using S = typename E::Scalar;
  using Word = typename E::Word;
  static constexpr int kWidth = E::Vector::kWidth, kNumbers = kWidth * E::kPerWord;
  Word* queries;  // [row][words of dim, padded to whole vectors]
  S *acc, *sums;  // [row][dim_v padded to whole words of vectors]: outputs, and what a step adds to them
  S *scores, *factors;
  Word* probs;
  const T **k, **v, **next_k;  // rows of the step's keys, and of the keys of the step after it
  T* rest;                     // [key][kNumbers]: the last features of values, where they are not whole vectors
  T* zeros;                    // the values of no key
  AddendScratch<typename E::Vector> addend;
  int query_words, dim_v;  // padded

  FewRowsScratch(const Params& p, Arena& arena) {
    constexpr int kRows = kFewRows<typename E::Vector>, kLanes = Panel<typename E::Vector>::kLanes;
    query_words = few_query_words<E>(p);
    dim_v = int((p.head_dim_v + kNumbers - 1) / kNumbers * kNumbers);
    queries = arena.take<Word>(int64_t(kRows) * query_words);
    acc = arena.take<S>(int64_t(kRows) * dim_v);
    sums = arena.take<S>(int64_t(kRows) * dim_v);
    scores = arena.take<S>(kFewKeys * kLanes);
    probs = E::kPerWord == 1 ? reinterpret_cast<Word*>(scores) : arena.take<Word>(kFewKeys / 2 * kLanes);
    factors = arena.take<S>(p.dropout_threshold ? kFewKeys * kLanes : 0);
    k = arena.take<const T*>(kFewKeys);
    v = arena.take<const T*>(kFewKeys);
    next_k = arena.take<const T*>(kFewKeys);
    const bool whole = p.head_dim_v % kNumbers == 0;
    rest = arena.take<T>(whole ? 0 : kFewKeys * kNumbers);
    zeros = arena.take<T>(dim_v);
    addend.values = arena.take<S>(kFewKeys * kLanes);
    addend.seen = arena.take<uint8_t>(kFewKeys);
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
  constexpr int kTogether = kKeys < 2 ? 1 : 2;
#pragma GCC unroll 16
  for (int n = 0; n < kKeys; n += kTogether) {
    for (int d = 0; d < dim; d += kNumbers) {
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

// ahead: rows of ahead_dim numbers to ask for meanwhile, one per key; may be null.
template <class E, class T, int kRows>
void few_scores_piece(const typename E::Word* queries, int ld, int dim, const T* const* k, int keys,
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

// scores[key][row] of `rows` queries, which are ld words apart. A score depends on its query and key alone, bit for
// bit: the backward pass computes it again among others. ahead: see above.
template <class E, class T>
void few_scores(const typename E::Word* queries, int ld, int rows, int dim, const T* const* k, int keys,
                typename E::Scalar* scores, const T* const* ahead, int ahead_dim) {
  for_row_pieces<typename E::Vector>(rows, [&](auto count, int r) {
    few_scores_piece<E, T, decltype(count)::value>(queries + r * ld, ld, dim, k, keys, scores + r,
                                                   r == 0 ? ahead : nullptr, ahead_dim);
  });
}

// The queries of a panel with few rows, as `few_scores` reads them: [row][ld words], zeros where a row sees nothing.
template <class E, class T>
void load_few_queries(const Params& p, const Sequence& seq, const Panel<typename E::Vector>& panel, int ld,
                      typename E::Word* queries) {
  for (int i = 0; i < panel.count * ld; ++i) queries[i] = 0;
  for (int r = 0; r < panel.count; ++r) {
    if (panel.keys[r].first < panel.keys[r].last)
      RowOperands<E, T>::query(row_of<const T>(p.q, seq, panel.b, panel.head[r], panel.query[r]), p.q.stride_d,
                               int(p.head_dim), queries + r * ld);
  }
}

// sums[row][d] (+)= the sum over four keys of probs[key word][row] * v[key][d], for kRows rows and `dim` features:
// whole words of vectors.
template <class E, class T, int kRows, bool kBegins>
void few_outputs_tile(const typename E::Word* probs, const T* const (&v)[4], int dim, typename E::Scalar* sums,
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

// The outputs of rows r .. r + kRows. seen: null, or 0 for keys that no row sees and whose memory may hold NaN.
// next_keys: of the step after this one, whose rows are asked for meanwhile, evenly: what is asked for at once the
// processor may drop.
template <class E, class T, int kRows>
void few_outputs(const FewRowsScratch<E, T>& s, int r, const uint8_t* seen, int keys, int dim_v,
                 const typename E::Scalar* alpha, int dim, int next_keys) {
  using V = typename E::Vector;
  constexpr int kTile = kRows == 4 && V::kWidth < 16 ? 2 : kRows;  // more need 32 registers
  const int whole = dim_v / s.kNumbers * s.kNumbers;
  for (int n = 0; n < keys; n += 4) {
    const T *v[4], *rest[4];
    for (int i = 0; i < 4; ++i) {
      if (n + i < next_keys) prefetch_row(s.next_k[n + i], dim);
      const bool there = n + i < keys && (seen == nullptr || seen[n + i]);
      v[i] = there ? s.v[n + i] : s.zeros;
      rest[i] = there ? s.rest + (n + i) * s.kNumbers : s.zeros;
    }
    for (int i = r; i < r + kRows; i += kTile) {
      const typename E::Word* probs = s.probs + n / E::kPerWord * Panel<V>::kLanes + i;
      typename E::Scalar* sums = s.sums + i * s.dim_v;
      auto product = n == 0 ? few_outputs_tile<E, T, kTile, true> : few_outputs_tile<E, T, kTile, false>;
      product(probs, v, whole, sums, s.dim_v);
      if (whole < dim_v) product(probs, rest, s.kNumbers, sums + whole, s.dim_v);
    }
  }
  for (int i = r; i < r + kRows; ++i) {
    for (int d = 0; d < s.dim_v; d += V::kWidth) {
      typename V::Scalar* to = s.acc + i * s.dim_v + d;
      fma(V::set(alpha[i]), V::load(to), V::load(s.sums + i * s.dim_v + d)).store(to);
    }
  }
}

template <class E, class T>
void few_rows_step(const Params& p, const Sequence& seq, const Panel<typename E::Vector>& panel, int64_t n0, int keys,
                   int next_keys, OnlineSoftmax<typename E::Vector>& state, FewRowsScratch<E, T>& s) {
  using V = typename E::Vector;
  const int dim = int(p.head_dim), dim_v = int(p.head_dim_v);
  const bool plain = can_be_plain(p, false) && panel.all.first <= n0 && n0 + keys <= panel.all.last;
  bool gaps = false;
  if (!plain && !make_addend(p, seq, panel, n0, keys, false, s.addend, gaps)) return;
  few_scores<E, T>(s.queries, s.query_words, panel.count, dim, s.k, keys, s.scores, s.v, dim_v);
  typename V::Scalar plain_max[Panel<V>::kLanes];
  if (plain) maximum<V, 1>(s.scores, keys, plain_max);
  softmax_step<E, 1>(p, panel, n0, keys, false, plain ? plain_max : nullptr, s.scores, s.addend.values, s.factors,
                     s.probs, state);
  const int whole = dim_v / s.kNumbers * s.kNumbers;
  for (int n = 0; n < keys && whole < dim_v; ++n) {
    const bool seen = !gaps || s.addend.seen[n];
    copy_part(s.v[n] + whole, seen ? dim_v - whole : 0, s.kNumbers, s.rest + n * s.kNumbers);
  }
  for (int n = keys; n % 4 != 0; ++n) {  // outputs take four keys at a time
    if (n % E::kPerWord != 0) continue;  // the other half of a word has been made zero
    for (int r = 0; r < panel.count; ++r) s.probs[n / E::kPerWord * Panel<V>::kLanes + r] = 0;
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
  load_few_queries<E, T>(p, seq, panel, s.query_words, s.queries);
  for (int i = 0; i < panel.count * s.dim_v; ++i) s.acc[i] = S(0);
  for (int i = 0; i < s.dim_v; ++i) s.zeros[i] = T{};
  auto find_keys = [&](int64_t n0, const T** rows) {
    const int keys = int(larger(0, smaller(kFewKeys, panel.any.last - n0)));
    for (int n = 0; n < keys; ++n) rows[n] = key_row<const T>(p, p.k, seq, job.b, job.head_kv, n0 + n);
    return keys;
  };
  int keys = find_keys(panel.any.first, s.k);
  for (int64_t n0 = panel.any.first; n0 < panel.any.last; n0 += kFewKeys) {
    for (int n = 0; n < keys; ++n) s.v[n] = key_row<const T>(p, p.v, seq, job.b, job.head_kv, n0 + n);
    const int next_keys = find_keys(n0 + kFewKeys, s.next_k);
    few_rows_step(p, seq, panel, n0, keys, next_keys, state, s);
    const T** used = s.k;
    s.k = s.next_k;
    s.next_k = used;
    keys = next_keys;
  }
  S inverse[Panel<V>::kLanes];
  finish_softmax(p, unit_of<S>(p, false), seq, panel, job, parts, 0, state, inverse);
  for (int r = 0; r < panel.count; ++r) {
    const V factor = V::set(inverse[r]), zero = V::set(S(0));
    S* acc = s.acc + r * s.dim_v;
    for (int d = 0; d < s.dim_v; d += V::kWidth)
      select(equal(factor, zero), zero, V::load(acc + d) * factor).store(acc + d);
    if (job.part >= 0) {
      store_row<V>(acc, int(p.head_dim_v), part_row<S>(p, job, parts, r), 1);
    } else {
      store_row<V>(acc, int(p.head_dim_v), row_of<T>(p.out, seq, job.b, panel.head[r], panel.query[r]), p.out.stride_d);
      const View residual = out_residual(p);
      if (residual.data == nullptr) continue;
      const V inf = V::set(S(__builtin_inf()));
      for (int d = 0; d < s.dim_v; d += V::kWidth)
        select(equal(factor, zero), inf, rounded_off<T>(V::load(acc + d))).store(acc + d);
      store_row<V>(acc, int(p.head_dim_v), row_of<T>(residual, seq, job.b, panel.head[r], panel.query[r]),
                   residual.stride_d);
    }
  }
}

template <class E>
size_t few_rows_scratch(const Params& p) {
  Arena arena(nullptr);
  FewRowsScratch<E, typename E::Scalar> scratch(p, arena);
  return arena.used();
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
