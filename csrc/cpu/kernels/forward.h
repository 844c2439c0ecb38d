// Forward pass: online softmax over blocks of keys.
//
// Lanes are queries: S^T = K Q^T (keys x lanes), softmax goes down the columns without crossing lanes, O^T = V^T P^T.
// Cost of a panel of 32 rows over n keys, in multiply-adds: n * 32 * (head_dim + head_dim_v) in the two products, and
// about n * 32 * 12 instructions / kWidth of softmax, so the products take 85% of the time at head_dim 64. K and V are
// read once per job from memory and once per panel from the second-level cache; scores never leave it. The products
// bound it.
#pragma once

#include "../simd/math.h"
#include "../tile/dropout.h"
#include "../tile/key_block.h"
#include "../tile/score_mod.h"
#include "../tile/scratch.h"
#include "table.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class V>
struct OnlineSoftmax {
  typename V::Scalar row_max[Panel<V>::kLanes], row_sum[Panel<V>::kLanes], alpha[Panel<V>::kLanes];
  bool begun;  // forward_step: whether there was one, which wrote the panel's acc
};

template <class E>
struct ForwardScratch {
  using S = typename E::Scalar;
  using Word = typename E::Word;
  S *scores, *factors;
  Word *probs, *queries, *gapless, *half_word;
  S* acc;
  AddendScratch<typename E::Vector> addend;
  BlockScratch<E> block;
  int64_t queries_size, acc_size;  // of one panel

  ForwardScratch(const Params& p, Arena& arena) {
    constexpr int kLanes = Panel<typename E::Vector>::kLanes;
    const int dim = int(p.head_dim), dim_v = int(p.head_dim_v), words = words_of(dim, E::kPerWord);
    queries_size = int64_t(words) * kLanes;
    acc_size = int64_t(dim_v) * kLanes;
    scores = arena.take<S>(kBlockKeys * kLanes);
    probs = E::kPerWord == 1 ? reinterpret_cast<Word*>(scores) : arena.take<Word>(kBlockKeys / 2 * kLanes);
    queries = arena.take<Word>(queries_size * kMaxPanelsPerJob);
    acc = arena.take<S>(acc_size * kMaxPanelsPerJob);
    block.k = arena.take<Word>(int64_t(kBlockKeys) * words);
    block.v = arena.take<Word>(tiles_size<E>(dim_v));
    factors = arena.take<S>(p.dropout_threshold ? kBlockKeys * kLanes : 0);
    addend.values = arena.take<S>(kBlockKeys * kLanes);
    addend.seen = arena.take<uint8_t>(kBlockKeys);
    gapless = arena.take<Word>(int64_t(kBlockKeys) * dim_v);
    half_word = arena.take<Word>(dim_v);
  }
};

// Products -> scores with everything added, in one vector of lanes; returns their maximum per lane.
template <class V>
V finish_scores(const Params& p, bool folded, typename V::Scalar* scores, const typename V::Scalar* addend, int keys) {
  using S = typename V::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const bool capped = p.softcap > 0;
  const double factor = capped ? p.scale / p.softcap : stay_products(p, folded) ? 1 : p.scale;
  const V scale = V::set(S(factor)), cap = V::set(S(p.softcap)), hidden = V::set(S(-__builtin_inf()));
  V highest = hidden;
  for (int at = 0; at < keys * kLanes; at += kLanes) {
    const V a = V::load(addend + at), raw = V::load(scores + at) * scale;
    V x = raw + a;
    if (capped) x = fma(tanh(raw), cap, a);
    // A hidden score may have been made of NaN: it must not become NaN + -inf.
    x = select(equal(a, hidden), hidden, x);
    x.store(scores + at);
    highest = max(highest, x);
  }
  return highest;
}

// The maximum per lane.
template <class V, int kVectors>
void maximum(const typename V::Scalar* scores, int keys, typename V::Scalar* highest) {
  constexpr int kLanes = Panel<V>::kLanes;
  for (int lane = 0; lane < kVectors * V::kWidth; lane += V::kWidth) {
    V some[4];  // so that no maximum waits for the one before it
    for (V& x : some) x = V::set(typename V::Scalar(-__builtin_inf()));
    int n = 0;
    for (; n + 4 <= keys; n += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) some[i] = max(some[i], V::load(scores + (n + i) * kLanes + lane));
    }
    for (; n < keys; ++n) some[0] = max(some[0], V::load(scores + n * kLanes + lane));
    max(max(some[0], some[1]), max(some[2], some[3])).store(highest + lane);
  }
}

// probs = exp2((scores - shift) * scale), as words; returns their sum. Dropout's factors, if there are any, apply to
// the words, not the sum. An error of the sum is one of a whole row of out, and of delta: so fours are added up first.
template <class E>
inline typename E::Vector exponentials(const typename E::Scalar* scores, typename E::Vector scale,
                                       typename E::Vector shift, const typename E::Scalar* factors, int keys,
                                       typename E::Word* probs) {
  using V = typename E::Vector;
  constexpr int kLanes = Panel<V>::kLanes;
  auto store = [&](V x, V next, int n) {
    if (factors != nullptr) x = x * V::load(factors + n * kLanes);
    if constexpr (E::kPerWord == 1) {
      x.store(probs + n * kLanes);
    } else {
      if (factors != nullptr && n + 1 < keys) next = next * V::load(factors + (n + 1) * kLanes);
      store_pairs(x, next, probs + n / 2 * kLanes);
    }
  };
  auto some = [&](auto count, int n) {
    V x[4], zero = V::set(0);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      x[i] = i < count.value ? exp2((V::load(scores + (n + i) * kLanes) - shift) * scale) : zero;
#pragma GCC unroll 4
    for (int i = 0; i < count.value; i += E::kPerWord) store(x[i], i + 1 < 4 ? x[i + 1] : zero, n + i);
    return (x[0] + x[1]) + (x[2] + x[3]);
  };
  V sum = V::set(0);
  int n = 0;
  for (; n + 4 <= keys; n += 4) sum = sum + some(Constant<4>{}, n);
  for (; n + E::kPerWord <= keys; n += E::kPerWord) sum = sum + some(Constant<E::kPerWord>{}, n);
  if (n < keys) sum = sum + some(Constant<1>{}, n);
  return sum;
}

template <class V>
void reset(OnlineSoftmax<V>& state) {
  using S = typename V::Scalar;
  state.begun = false;
  for (int lane = 0; lane < Panel<V>::kLanes; ++lane) {
    state.row_max[lane] = S(-__builtin_inf());
    state.row_sum[lane] = S(0);
  }
}

// Online softmax over keys n0 .. n0 + keys: scores become probs (which may be the same memory), relative to the new
// maximum; state.alpha is what everything before has to be multiplied with. folded: whether the scores have ALiBi and
// bias. plain_max: of a plain step, whose products are the scores, their maximum per lane; else null.
template <class E, int kVectors>
void softmax_step(const Params& p, const Panel<typename E::Vector>& panel, int64_t n0, int keys, bool folded,
                  const typename E::Scalar* plain_max, typename E::Scalar* scores, const typename E::Scalar* addend,
                  typename E::Scalar* factors, typename E::Word* probs, OnlineSoftmax<typename E::Vector>& state) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  const V scale = V::set(unit_of<S>(p, folded).exponent), lowest = V::set(S(-__builtin_inf()));
  // 1 / (1 - p) comes last: words of half precision round nothing more for it.
  if (p.dropout_threshold != 0) make_dropout(p, panel, n0, keys, S(1), factors);
  for (int lane = 0; lane < kVectors * V::kWidth; lane += V::kWidth) {
    const V highest = plain_max != nullptr ? V::load(plain_max + lane)
                                           : finish_scores<V>(p, folded, scores + lane, addend + lane, keys);
    const V old = V::load(state.row_max + lane), now = max(highest, old);
    now.store(state.row_max + lane);
    // While a row has seen nothing its maximum is -inf; 0 stands in, as -inf - (-inf) is NaN.
    const V shift = select(equal(now, lowest), V::set(S(0)), now), alpha = exp2((old - shift) * scale);
    alpha.store(state.alpha + lane);
    // Two calls: a constant leaves a loop without dropout.
    const V sum = p.dropout_threshold == 0
                      ? exponentials<E>(scores + lane, scale, shift, nullptr, keys, probs + lane)
                      : exponentials<E>(scores + lane, scale, shift, factors + lane, keys, probs + lane);
    fma(V::load(state.row_sum + lane), alpha, sum).store(state.row_sum + lane);
  }
}

// Products of q and k, together with ALiBi and bias where these are folded in. plain_max: null, or where the maximum
// per lane of a plain step is wanted.
template <class E, int kVectors>
void make_scores(const Params& p, const Sequence& seq, const Panel<typename E::Vector>& panel, int64_t n0, int keys,
                 const typename E::Word* k, int64_t k_stride, int words, const typename E::Word* queries,
                 typename E::Scalar* scores, typename E::Scalar* plain_max) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  if (folds_terms(p)) {
    make_terms(p, seq, panel, n0, keys, S(1 / p.scale), scores);
    gemm<E, kVectors, Update::kAdd>(keys, words, k, k_stride, queries, scores);
  } else if (E::kPerWord == 1 && plain_max != nullptr) {  // in one pass, which pairs are too quick to gain by
    for (int lane = 0; lane < kLanes; ++lane) plain_max[lane] = S(-__builtin_inf());
    gemm<E, kVectors, Update::kStoreMax>(keys, words, k, k_stride, queries, scores, plain_max);
    return;
  } else {
    gemm<E, kVectors, Update::kStore>(keys, words, k, k_stride, queries, scores);
  }
  if (plain_max != nullptr) maximum<V, kVectors>(scores, keys, plain_max);
}

// One step: keys n0 .. n0 + keys, which begin at the block's row `at`, against one panel.
template <class E, int kVectors>
void forward_step(const Params& p, const Sequence& seq, const Panel<typename E::Vector>& panel,
                  const KeyBlock<E>& block, int at, int64_t n0, int keys, bool plain, const typename E::Word* queries,
                  typename E::Scalar* acc, OnlineSoftmax<typename E::Vector>& state, ForwardScratch<E>& scratch) {
  constexpr int kLanes = Panel<typename E::Vector>::kLanes;
  const int dim_v = int(p.head_dim_v), words = words_of(int(p.head_dim), E::kPerWord);
  bool gaps = false;
  if (!plain && !make_addend(p, seq, panel, n0, keys, folds_terms(p), scratch.addend, gaps)) return;
  typename E::Scalar plain_max[kLanes];
  make_scores<E, kVectors>(p, seq, panel, n0, keys, block.k + at * block.k_stride, block.k_stride, words, queries,
                           scratch.scores, plain ? plain_max : nullptr);
  softmax_step<E, kVectors>(p, panel, n0, keys, folds_terms(p), plain ? plain_max : nullptr, scratch.scores,
                            scratch.addend.values, scratch.factors, scratch.probs, state);
  ColumnTiles<E> v = block.v.from(at / E::kPerWord);
  if (gaps) v = without_gaps<E>(v, keys, dim_v, scratch.addend.seen, scratch.gapless);
  // Each block is summed from zero and then added: errors grow with the number of blocks, not of keys.
  if (state.begun) {
    gemm_over_keys<E, kVectors, Update::kScaleAdd>(dim_v, keys, v, scratch.probs, acc, scratch.half_word, state.alpha);
  } else {
    gemm_over_keys<E, kVectors, Update::kStore>(dim_v, keys, v, scratch.probs, acc, scratch.half_word);
    state.begun = true;
  }
}

// The block's keys against one panel, cut where the panel's rows stop seeing the same keys.
template <class E>
void forward_block(const Params& p, const Sequence& seq, const Panel<typename E::Vector>& panel,
                   const KeyBlock<E>& block, int64_t n0, int64_t n1, const typename E::Word* queries,
                   typename E::Scalar* acc, OnlineSoftmax<typename E::Vector>& state, ForwardScratch<E>& scratch) {
  constexpr int64_t kAlign = E::kPerWord;  // a step begins at a whole word of v
  const bool simple = can_be_plain(p, folds_terms(p));
  const int64_t first = larger(n0, n0 + (panel.any.first - n0) / kAlign * kAlign), last = smaller(n1, panel.any.last);
  int64_t plain_first = n0 + (panel.all.first - n0 + kAlign - 1) / kAlign * kAlign,
          plain_last = n0 + (panel.all.last - n0) / kAlign * kAlign;
  plain_first = larger(first, smaller(last, plain_first));
  plain_last = panel.all.last >= last ? last : larger(plain_first, smaller(last, plain_last));
  if (!simple) plain_first = plain_last = last;
  const int64_t cuts[4] = {first, plain_first, plain_last, last};
  for (int piece = 0; piece < 3; ++piece) {
    const int keys = int(cuts[piece + 1] - cuts[piece]);
    if (keys <= 0) continue;
    const int at = int(cuts[piece] - n0);
    if (panel.vectors == 2) {
      forward_step<E, 2>(p, seq, panel, block, at, cuts[piece], keys, piece == 1, queries, acc, state, scratch);
    } else {
      forward_step<E, 1>(p, seq, panel, block, at, cuts[piece], keys, piece == 1, queries, acc, state, scratch);
    }
  }
}

// The sink of a head, -inf if there is none. Rows behind the last sequence of a varlen call belong to no sequence and
// have none.
template <class S>
S sink_of(const Params& p, int64_t b, int64_t head) {
  if (p.sinks.data == nullptr || b >= p.batch) return S(-__builtin_inf());
  return static_cast<const S*>(p.sinks.data)[head * p.sinks.stride_h];
}

// How a row ends: its lse, if it is wanted or there is a sink, and what its accumulated outputs are multiplied with, 0
// if it saw nothing.
template <class S>
struct RowEnd {
  Twofold<S> lse;
  S factor;
  bool saw_nothing;

  RowEnd(const Unit<S>& unit, S row_max, S row_sum, S sink, bool lse_wanted) {
    // Not by the maximum, in which NaN can be lost: a row that saw anything has a sum of at least 1, or NaN.
    saw_nothing = row_sum == S(0);
    S share = S(1);
    if (lse_wanted || sink != S(-__builtin_inf())) {
      lse = saw_nothing ? Twofold<S>{S(-__builtin_inf()), S(0)} : log_sum(unit, row_max, row_sum);
      share = add_sink(sink, lse);
    }
    factor = saw_nothing ? S(0) : share / row_sum;
  }
};

// Writes lse of a query, and what rounding took from it: inf if it saw nothing.
template <class S>
void store_lse(const Params& p, const Sequence& seq, int64_t b, int64_t head, int64_t query, const RowEnd<S>& end) {
  if (p.lse.data == nullptr) return;
  *row_of<S>(p.lse, seq, b, head, query) = end.lse.high;
  const View residual = lse_residual(p);
  if (residual.data != nullptr)
    *row_of<S>(residual, seq, b, head, query) = end.saw_nothing ? S(__builtin_inf()) : end.lse.low;
}

// Where a row of a job's parts, which are merged later, begins.
template <class S>
S* part_row(const Params& p, const ForwardJob& job, const Parts& parts, int64_t row) {
  const int64_t at = job.part * parts.rows_total + job.first_part_row + row;
  return static_cast<S*>(parts.out) + at * p.head_dim_v;
}

// Ends the softmax of a panel: writes lse, or in a part of the keys the maximum and the sum. inverse: what the
// accumulated outputs are multiplied with, 0 for a row that saw nothing. A sink counts once: not in parts, but when
// they are merged.
template <class V>
void finish_softmax(const Params& p, const Unit<typename V::Scalar>& unit, const Sequence& seq, const Panel<V>& panel,
                    const ForwardJob& job, const Parts& parts, int64_t first_row, const OnlineSoftmax<V>& state,
                    typename V::Scalar* inverse) {
  using S = typename V::Scalar;
  const S kept = p.dropout_threshold != 0 ? S(p.dropout_scale) : S(1);
  const int64_t at = job.part * parts.rows_total + job.first_part_row + first_row;
  for (int lane = 0; lane < Panel<V>::kLanes; ++lane) {
    inverse[lane] = S(0);
    if (lane >= panel.count) continue;
    const S row_max = state.row_max[lane], row_sum = state.row_sum[lane];
    const bool whole = job.part < 0;
    const S sink = whole ? sink_of<S>(p, panel.b, panel.head[lane]) : S(-__builtin_inf());
    const RowEnd<S> end(unit, row_max, row_sum, sink, whole && p.lse.data != nullptr);
    inverse[lane] = end.factor * kept;
    if (whole) {
      store_lse(p, seq, panel.b, panel.head[lane], panel.query[lane], end);
    } else {
      static_cast<S*>(parts.row_max)[at + lane] = row_max;
      static_cast<S*>(parts.row_sum)[at + lane] = row_sum;
    }
  }
}

// What rounding to T takes from x, times kResidualScale; 0 where that gives no finite number.
template <class T, class V>
V rounded_off(V x) {
  T high[V::kWidth];
  x.store(high);
  const V low = (x - V::load(high)) * V::set(kResidualScale);
  return select(less(abs(low), V::set(typename V::Scalar(__builtin_inf()))), low, V::set(0));
}

// out = acc / row_sum, turned from columns into rows; and what goes with it.
template <class E, class T>
void finish_panel(const Params& p, const Sequence& seq, const Panel<typename E::Vector>& panel, const ForwardJob& job,
                  const Parts& parts, int64_t first_row, const typename E::Scalar* acc,
                  const OnlineSoftmax<typename E::Vector>& state) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  S inverse[kLanes];
  finish_softmax(p, unit_of<S>(p, folds_terms(p)), seq, panel, job, parts, first_row, state, inverse);
  auto store = [&](auto* const* rows, int64_t stride, S of_nothing, auto part_of) {
    for (int lane = 0; lane < panel.count; lane += V::kWidth) {
      const V factor = V::load(inverse + lane), instead = V::set(of_nothing);
      const auto empty = equal(factor, V::set(S(0)));
      store_columns<V>(
          int(p.head_dim_v), int(smaller(V::kWidth, panel.count - lane)),
          [&](int d) { return select(empty, instead, part_of(V::load(acc + d * kLanes + lane) * factor)); },
          rows + lane, stride);
    }
  };
  if (job.part >= 0) {
    S* rows[kLanes];
    for (int lane = 0; lane < panel.count; ++lane) rows[lane] = part_row<S>(p, job, parts, first_row + lane);
    store(rows, 1, S(0), [](V x) { return x; });
  } else {
    T* rows[kLanes];
    auto find_rows = [&](const View& view) {
      for (int lane = 0; lane < panel.count; ++lane)
        rows[lane] = row_of<T>(view, seq, panel.b, panel.head[lane], panel.query[lane]);
    };
    find_rows(p.out);
    store(rows, p.out.stride_d, S(0), [](V x) { return x; });
    const View residual = out_residual(p);
    if (residual.data != nullptr) {
      find_rows(residual);
      store(rows, residual.stride_d, S(__builtin_inf()), [](V x) { return rounded_off<T>(x); });
    }
  }
}

template <class E, class T>
void forward_job(const Params& p, const ForwardJob& job, const Parts& parts, void* memory) {
  using V = typename E::Vector;
  constexpr int kLanes = Panel<V>::kLanes;
  Arena arena(memory);
  ForwardScratch<E> scratch(p, arena);
  const Sequence seq = sequence_of(p, job.b);
  Panel<V> panels[kMaxPanelsPerJob];
  OnlineSoftmax<V> states[kMaxPanelsPerJob];
  int count = 0;
  KeyRange keys{job.keys.last, job.keys.first};
  for (int64_t row = 0; row < job.rows; row += kLanes, ++count) {
    Panel<V>& panel = panels[count];
    set_panel(panel, p, seq, job.b, group_of(p, job.head_kv), job.first_row + row, job.rows - row, job.keys);
    const T* rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool sees = panel.keys[lane].first < panel.keys[lane].last;
      rows[lane] = sees ? row_of<const T>(p.q, seq, job.b, panel.head[lane], panel.query[lane]) : nullptr;
    }
    reset(states[count]);
    Columns<E, T>::pack(rows, panel.vectors * V::kWidth, p.q.stride_d, int(p.head_dim),
                        scratch.queries + count * scratch.queries_size, kLanes);
    if (panel.any.first < panel.any.last)
      keys = {smaller(keys.first, panel.any.first), larger(keys.last, panel.any.last)};
  }
  // Blocks begin at whole words and end at multiples of their size, so that a panel's results do not depend on which
  // others share its job. Without visible keys there is none: `keys` may lie anywhere.
  if (keys.first < keys.last) keys.first = keys.first / E::kPerWord * E::kPerWord;
  for (int64_t n0 = keys.first; n0 < keys.last;) {
    const int64_t n1 = smaller(keys.last, (n0 / kBlockKeys + 1) * kBlockKeys);
    const KeyBlock<E> block = load_block(E{}, static_cast<const T*>(nullptr), p, seq, job.b, job.head_kv, n0,
                                         int(n1 - n0), count, scratch.block);
    for (int i = 0; i < count; ++i) {
      if (panels[i].any.first < n1 && n0 < panels[i].any.last)
        forward_block<E>(p, seq, panels[i], block, n0, n1, scratch.queries + i * scratch.queries_size,
                         scratch.acc + i * scratch.acc_size, states[i], scratch);
    }
    n0 = n1;
  }
  for (int i = 0; i < count; ++i)
    finish_panel<E, T>(p, seq, panels[i], job, parts, i * kLanes, scratch.acc + i * scratch.acc_size, states[i]);
}

template <class E>
size_t forward_scratch(const Params& p) {
  Arena arena(nullptr);
  ForwardScratch<E> scratch(p, arena);
  return arena.used();
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
