// Forward pass for few query rows, as in decoding: lanes are features, not queries.
//
// With fewer rows than lanes the products of forward.h would compute mostly padding, and would copy K and V that are
// not float32. Here each key's row is read once, as it lies (any page size, any dtype), dotted with all queries, and
// each value's row is added to all outputs. Cost per key and row: (head_dim + head_dim_v) / kWidth multiply-adds and 1
// / kWidth of a transpose; bytes: each key and value once. Reading them bounds it.
#pragma once

#include "forward.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class V>
constexpr int kFewRows = V::kWidth < 8 ? V::kWidth : 8;

template <class V>
bool few_rows(const Params& p, const ForwardJob& job) {
  return job.rows <= kFewRows<V> && p.k.stride_d == 1 && p.v.stride_d == 1;
}

template <class V, class T>
struct FewRowsScratch {
  using S = typename V::Scalar;
  S *queries, *acc;  // [row][dim padded to whole vectors]
  S *scores, *factors;
  const T **k, **v, **next_k;  // rows of the block's keys, and of the keys of the block after it
  AddendScratch<V> addend;
  int dim, dim_v;

  FewRowsScratch(const Params& p, Arena& arena) {
    constexpr int kLanes = Panel<V>::kLanes;
    dim = int((p.head_dim + V::kWidth - 1) / V::kWidth * V::kWidth);
    dim_v = int((p.head_dim_v + V::kWidth - 1) / V::kWidth * V::kWidth);
    queries = arena.take<S>(int64_t(kFewRows<V>) * dim);
    acc = arena.take<S>(int64_t(kFewRows<V>) * dim_v);
    scores = arena.take<S>(kBlockKeys * kLanes);
    factors = arena.take<S>(p.dropout_threshold ? kBlockKeys * kLanes : 0);
    k = arena.take<const T*>(kBlockKeys);
    v = arena.take<const T*>(kBlockKeys);
    next_k = arena.take<const T*>(kBlockKeys);
    addend.values = arena.take<S>(kBlockKeys * kLanes);
    addend.seen = arena.take<uint8_t>(kBlockKeys);
  }
};

// scores[key][row] of kRows queries and kWidth / kRows keys.
template <class V, class T, int kRows>
void few_scores_tile(const typename V::Scalar* queries, int ld, int dim, const T* const* k, int keys,
                     typename V::Scalar* scores) {
  constexpr int kKeys = V::kWidth / kRows;
  V acc[V::kWidth];
  for (int i = 0; i < V::kWidth; ++i) acc[i] = V::set(0);
  for (int d = 0; d < dim; d += V::kWidth) {
    V q[kRows];
    for (int r = 0; r < kRows; ++r) q[r] = V::load(queries + r * ld + d);
#pragma GCC unroll 16
    for (int n = 0; n < kKeys; ++n) {
      const V key = load_some<V>(k[n < keys ? n : 0] + d, dim - d);
      for (int r = 0; r < kRows; ++r) acc[n * kRows + r] = fma(key, q[r], acc[n * kRows + r]);
    }
  }
  typename V::Scalar sums[V::kWidth];
  sum_of_lanes(acc).store(sums);
  for (int n = 0; n < keys; ++n)
    for (int r = 0; r < kRows; ++r) scores[n * Panel<V>::kLanes + r] = sums[n * kRows + r];
}

// ahead: rows of ahead_dim numbers to ask for meanwhile, one per key; may be null.
template <class V, class T, int kRows>
void few_scores(const typename V::Scalar* queries, int ld, int dim, const T* const* k, int keys,
                typename V::Scalar* scores, const T* const* ahead, int ahead_dim) {
  constexpr int kKeys = V::kWidth / kRows;
  for (int n = 0; n < keys; n += kKeys) {
    const int some = int(smaller(kKeys, keys - n));
    for (int i = 0; i < some && ahead != nullptr; ++i) prefetch_row(ahead[n + i], ahead_dim);
    few_scores_tile<V, T, kRows>(queries, ld, dim, k + n, some, scores + n * Panel<V>::kLanes);
  }
}

// acc[row][..] = alpha[row] * acc + sum over keys of probs[key][row] * v[key][..], for kRows rows and kVectors vectors.
// seen: null, or 0 for keys that no row sees and whose memory may hold NaN.
template <class V, class T, int kRows, int kVectors>
void few_outputs_tile(const typename V::Scalar* probs, const T* const* v, const uint8_t* seen, int keys, int d,
                      int left, const typename V::Scalar* alpha, typename V::Scalar* acc, int ld, const T* const* ahead,
                      int ahead_dim, int ahead_keys) {
  V sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVectors; ++i) sum[r][i] = V::set(0);
  for (int n = 0; n < keys; ++n) {
    if (n < ahead_keys) prefetch_row(ahead[n], ahead_dim);
    if (seen != nullptr && !seen[n]) continue;
    V value[kVectors];
    for (int i = 0; i < kVectors; ++i) value[i] = load_some<V>(v[n] + d + i * V::kWidth, left - i * V::kWidth);
    for (int r = 0; r < kRows; ++r) {
      const V prob = V::set(probs[n * Panel<V>::kLanes + r]);
      for (int i = 0; i < kVectors; ++i) sum[r][i] = fma(prob, value[i], sum[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVectors; ++i) {
      typename V::Scalar* to = acc + r * ld + d + i * V::kWidth;
      fma(V::set(alpha[r]), V::load(to), sum[r][i]).store(to);
    }
}

template <class V, class T, int kRows>
void few_outputs(const typename V::Scalar* probs, const T* const* v, const uint8_t* seen, int keys, int dim,
                 const typename V::Scalar* alpha, typename V::Scalar* acc, int ld, const T* const* ahead, int ahead_dim,
                 int ahead_keys) {
  constexpr int kVectors = V::kWidth >= 8 ? 4 : 2;
  int d = 0;
  for (; d + kVectors * V::kWidth <= dim; d += kVectors * V::kWidth, ahead_keys = 0)
    few_outputs_tile<V, T, kRows, kVectors>(probs, v, seen, keys, d, dim - d, alpha, acc, ld, ahead, ahead_dim,
                                            ahead_keys);
  for (; d < dim; d += V::kWidth, ahead_keys = 0)
    few_outputs_tile<V, T, kRows, 1>(probs, v, seen, keys, d, dim - d, alpha, acc, ld, ahead, ahead_dim, ahead_keys);
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

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

template <class V, class T>
void few_rows_block(const Params& p, const Sequence& seq, const Panel<V>& panel, int64_t n0, int keys, int next_keys,
                    OnlineSoftmax<V>& state, FewRowsScratch<V, T>& s) {
  const int dim = int(p.head_dim), dim_v = int(p.head_dim_v);
  const bool plain =
      can_be_plain(p) && !has_terms(p) && p.scale > 0 && panel.all.first <= n0 && n0 + keys <= panel.all.last;
  bool gaps = false;
  if (!plain && !make_addend(p, seq, panel, n0, keys, s.addend, gaps)) return;
  for_row_pieces<V>(panel.count, [&](auto rows, int r) {
    few_scores<V, T, decltype(rows)::value>(s.queries + r * s.dim, s.dim, dim, s.k, keys, s.scores + r,
                                            r == 0 ? s.v : nullptr, dim_v);
  });
  typename V::Scalar plain_max[Panel<V>::kLanes];
  if (plain) maximum<V, 1>(s.scores, keys, plain_max);
  softmax_step<Single<V>, 1>(p, panel, n0, keys, plain ? plain_max : nullptr, s.scores, s.addend.values, s.factors,
                             s.scores, state);
  for_row_pieces<V>(panel.count, [&](auto rows, int r) {
    few_outputs<V, T, decltype(rows)::value>(s.scores + r, s.v, gaps ? s.addend.seen : nullptr, keys, dim_v,
                                             state.alpha + r, s.acc + r * s.dim_v, s.dim_v, s.next_k, dim,
                                             r == 0 ? next_keys : 0);
  });
}

template <class V, class T>
void few_rows_job(const Params& p, const ForwardJob& job, const Parts& parts, void* memory) {
  using S = typename V::Scalar;
  Arena arena(memory);
  FewRowsScratch<V, T> s(p, arena);
  const Sequence seq = sequence_of(p, job.b);
  Panel<V> panel;
  set_panel(panel, p, seq, job.b, group_of(p, job.head_kv), job.first_row, job.rows, job.keys);
  OnlineSoftmax<V> state;
  reset(state);
  for (int i = 0; i < kFewRows<V> * s.dim; ++i) s.queries[i] = S(0);
  for (int i = 0; i < kFewRows<V> * s.dim_v; ++i) s.acc[i] = S(0);
  for (int r = 0; r < panel.count; ++r) {
    if (panel.keys[r].first < panel.keys[r].last)
      copy_row<V>(row_of<const T>(p.q, seq, job.b, panel.head[r], panel.query[r]), p.q.stride_d, int(p.head_dim),
                  s.queries + r * s.dim);
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
    S* row = s.acc + r * s.dim_v;
    for (int d = 0; d < s.dim_v; ++d) row[d] = inverse[r] == S(0) ? S(0) : row[d] * inverse[r];
    store_output<V, T>(p, seq, panel, job, parts, r, r, 0, int(p.head_dim_v), row);
  }
  store_lse(p, seq, panel, job, parts, 0, lse);
}

template <class V>
size_t few_rows_scratch(const Params& p) {
  Arena arena(nullptr);
  FewRowsScratch<V, float> scratch(p, arena);
  return arena.used();
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
