// Backward pass, in the forward's orientation: lanes are queries.
//
//   S^T = K Q^T      P^T = exp2(S^T - lse)      dP^T = V dO^T      dS^T = P^T (dP^T - delta)
//   dV += P^T dO     dK += dS^T Q               dQ^T += K^T dS^T
//
// Cost per panel of 32 rows and n keys, in multiply-adds: n * 32 * (3 head_dim + 2 head_dim_v), plus some 20
// instructions / kWidth per score: the five products bound it. A job owns a range of keys: dK and dV of a block stay in
// the second-level cache while all queries pass by; dQ is read and written once per block, 2 / kBlockKeys of the
// products' work. Jobs over parts of the keys write dQ addends of their own, summed in the order of the parts: no
// atomics, the same bits always.
#pragma once

#include "decode.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t padded(int64_t dim, int width) { return (dim + width - 1) / width * width; }

// Panels whose rows go into dV and dK together. The products over one panel's few rows alone would spend a fifth of
// their time on loading and storing what they add to.
template <class E>
constexpr int kGroupPanels = larger(1, smaller(8, 64 * E::kPerWord / Panel<typename E::Vector>::kLanes));

// Probabilities and score gradients, as the operands of the products that follow.
template <class E>
struct Operands {
  using Word = typename E::Word;
  static constexpr int kPanelWords = Panel<typename E::Vector>::kLanes / E::kPerWord;
  static constexpr int kRow = kGroupPanels<E> * kPanelWords;
  Word* probs;        // [key][lane words of a group]: words along the lanes, for dV
  Word* dscores;      // [key][lane words of a group]: likewise, for dK
  Word* dscores_key;  // [key word][lane] of one panel: words along the keys, for dQ

  // Those of one panel of the group, from a key on.
  Operands at(int key, int panel) const {
    const int64_t shift = key * int64_t(kRow) + panel * kPanelWords;
    return {probs + shift, dscores + shift, dscores_key};
  }
};

template <class E>
struct BackwardScratch {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  using Word = typename E::Word;
  static constexpr int kLanes = Panel<V>::kLanes;

  S *scores, *dprobs, *factors, *dbias;
  S *dk, *dv;                // [columns of kLanes][key][kLanes], along dim
  S *lse, *lse_low, *delta;  // [lane], lse in the unit of scores, and what it lacks as an exponent of 2
  bool few, folded;          // the sequence has few rows; products have ALiBi and bias in them
  Word* few_queries;         // [row][query_words], instead of q_columns where rows are few, and
  const void** few_keys;     // [key]: rows of k
  int query_words;
  Word *q_columns, *dout_columns;  // [word of dim][lane]
  Word *q_rows, *dout_rows;        // [columns of kLanes][lane words of a group][kLanes], along dim
  Operands<E> operands;
  AddendScratch<V> addend;
  const Word *k, *v;  // of a block, along head_dim and head_dim_v
  int64_t k_stride, v_stride;
  ColumnTiles<E> k_keys;  // k with words along the keys
  Word *k_copy, *v_copy, *k_keys_copy;
  Word *gapless, *half_word;

  BackwardScratch(const Params& p, Arena& arena) {
    const int64_t dim = padded(p.head_dim, kLanes), dim_v = padded(p.head_dim_v, kLanes);
    const int words = words_of(int(p.head_dim), E::kPerWord), words_v = words_of(int(p.head_dim_v), E::kPerWord);
    scores = arena.take<S>(kBlockKeys * kLanes);
    dprobs = arena.take<S>(kBlockKeys * kLanes);
    factors = arena.take<S>(p.dropout_threshold ? kBlockKeys * kLanes : 0);
    dk = arena.take<S>(kBlockKeys * dim);
    dv = arena.take<S>(kBlockKeys * dim_v);
    dbias = arena.take<S>(p.dbias.data ? kBlockKeys * kLanes : 0);
    lse = arena.take<S>(kLanes);
    lse_low = arena.take<S>(kLanes);
    delta = arena.take<S>(kLanes);
    query_words = few_query_words<E>(p);
    few_queries = arena.take<Word>(int64_t(kFewRows<V>) * query_words);
    few_keys = arena.take<const void*>(kBlockKeys);
    q_columns = arena.take<Word>(int64_t(words) * kLanes);
    dout_columns = arena.take<Word>(int64_t(words_v) * kLanes);
    q_rows = arena.take<Word>(Operands<E>::kRow * dim);
    dout_rows = arena.take<Word>(Operands<E>::kRow * dim_v);
    operands.probs = arena.take<Word>(kBlockKeys * Operands<E>::kRow);
    operands.dscores = arena.take<Word>(kBlockKeys * Operands<E>::kRow);
    operands.dscores_key = arena.take<Word>(kBlockKeys / E::kPerWord * kLanes);
    addend.values = arena.take<S>(kBlockKeys * kLanes);
    addend.seen = arena.take<uint8_t>(kBlockKeys);
    k_copy = arena.take<Word>(int64_t(kBlockKeys) * words);
    v_copy = arena.take<Word>(int64_t(kBlockKeys) * words_v);
    k_keys_copy = arena.take<Word>(tiles_size<E>(p.head_dim));
    gapless = arena.take<Word>(int64_t(kBlockKeys) * p.head_dim);
    half_word = arena.take<Word>(p.head_dim);
  }
};

// Turns to a sequence: its scores are computed as the forward pass did.
template <class E>
void set_sequence(const Params& p, const Sequence& seq, BackwardScratch<E>& s) {
  s.few = few_rows<typename E::Vector>(p, seq);
  s.folded = folds_terms(p) && !s.few;
}

template <class E, class T>
void find_few_keys(const Params& p, const Sequence& seq, int64_t b, int64_t head_kv, int64_t n0, int keys,
                   BackwardScratch<E>& s) {
  for (int n = 0; n < keys && s.few; ++n) s.few_keys[n] = key_row<const T>(p, p.k, seq, b, head_kv, n0 + n);
}

// panels: how many will read k_keys.
template <class V, class T>
void load_backward_block(BackwardScratch<Single<V>>& s, const T*, const Params& p, const Sequence& seq, int64_t b,
                         int64_t head_kv, int64_t n0, int keys, int64_t panels) {
  find_few_keys<Single<V>, T>(p, seq, b, head_kv, n0, keys, s);
  load_rows<V, T>(p, p.k, int(p.head_dim), seq, b, head_kv, n0, keys, s.k_copy, s.k, s.k_stride);
  load_rows<V, T>(p, p.v, int(p.head_dim_v), seq, b, head_kv, n0, keys, s.v_copy, s.v, s.v_stride);
  s.k_keys = columns_of<Single<V>>(s.k, s.k_stride, keys, int(p.head_dim), panels, s.k_keys_copy);
}

#ifdef __AVX512BF16__
inline void load_backward_block(BackwardScratch<Pairs>& s, const bf16*, const Params& p, const Sequence& seq, int64_t b,
                                int64_t head_kv, int64_t n0, int keys, int64_t) {
  find_few_keys<Pairs, bf16>(p, seq, b, head_kv, n0, keys, s);
  load_pair_rows(p, p.k, int(p.head_dim), seq, b, head_kv, n0, keys, s.k_copy, s.k, s.k_stride);
  load_pair_rows(p, p.v, int(p.head_dim_v), seq, b, head_kv, n0, keys, s.v_copy, s.v, s.v_stride);
  s.k_keys = interleave_keys(p, p.k, int(p.head_dim), seq, b, head_kv, n0, keys, s.k_keys_copy);
}
#endif

// Rows of a panel, at most kLanes numbers of each from column d on, as [word of lanes][kLanes]; zeros behind the last
// that exists, up to whole vectors.
template <class V, class T>
void pack_rows(Single<V>, const T* const* rows, int lanes, int64_t stride, int d, int columns,
               typename V::Scalar* words) {
  constexpr int kLanes = kLanesOf<V>;
  for (int lane = 0; lane < lanes; ++lane, words += kLanes) {
    int i = 0;
    if (rows[lane] != nullptr) {
      copy_row<V>(rows[lane] + d * stride, stride, columns, words);
      i = columns;
    }
    for (; i < padded(columns, V::kWidth); ++i) words[i] = typename V::Scalar(0);
  }
}

#ifdef __AVX512BF16__
inline void pack_rows(Pairs, const bf16* const* rows, int lanes, int64_t stride, int d, int columns, uint32_t* words) {
  auto from = [&](int lane) { return rows[lane] ? rows[lane] + d * stride : nullptr; };
  for (int lane = 0; lane < lanes; lane += 2, words += kLanesOf<F32>) {
    interleave_rows(from(lane), stride, from(lane + 1), columns, words);
    for (int i = columns; i < padded(columns, F32::kWidth); ++i) words[i] = 0;
  }
}
#endif

// lse of a query.
template <class S>
Twofold<S> load_lse(const Params& p, const Sequence& seq, int64_t b, int64_t head, int64_t query) {
  const View residual = lse_residual(p);
  Twofold<S> lse{*row_of<const S>(p.lse, seq, b, head, query), S(0)};
  if (residual.data != nullptr) lse.low = *row_of<const S>(residual, seq, b, head, query);
  if (lse.low == S(__builtin_inf())) lse.low = S(0);
  return lse;
}

// Whether a query saw no key: by lse, or with a sink by the residual. Its gradients are 0, whatever dout holds.
template <class S, class T>
bool saw_nothing(const Params& p, const Sequence& seq, int64_t b, int64_t head, int64_t query) {
  if (*row_of<const S>(p.lse, seq, b, head, query) == S(-__builtin_inf())) return true;
  if (p.residual.data == nullptr) return false;
  const S inf = S(__builtin_inf());
  if (lse_residual(p).data != nullptr) return *row_of<const S>(p.residual, seq, b, head, query) == inf;
  return p.head_dim_v > 0 && S(to_float(*row_of<const T>(p.residual, seq, b, head, query))) == inf;
}

// Brings the queries, output gradients, lse and delta of a group's panel into scratch. Rows that saw nothing take no
// part, nor do rows that see none of the block's keys.
template <class E, class T>
void load_panel(const Params& p, const Sequence& seq, const Panel<typename E::Vector>& panel, int place,
                const BackwardSpace& space, BackwardScratch<E>& s) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const int lanes = panel.vectors * V::kWidth;
  const Unit<S> unit = unit_of<S>(p, s.folded);
  const T *q[kLanes], *dout[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    q[lane] = dout[lane] = nullptr;
    s.lse[lane] = S(__builtin_inf());  // all probabilities become 0
    s.lse_low[lane] = s.delta[lane] = S(0);
    if (lane >= panel.count || panel.keys[lane].first >= panel.keys[lane].last) continue;
    const int64_t head = panel.head[lane], query = panel.query[lane];
    if (saw_nothing<S, T>(p, seq, panel.b, head, query)) continue;
    q[lane] = row_of<const T>(p.q, seq, panel.b, head, query);
    dout[lane] = row_of<const T>(p.dout, seq, panel.b, head, query);
    const Twofold<S> lse = over(load_lse<S>(p, seq, panel.b, head, query), unit.natural);
    s.lse[lane] = lse.high;
    s.lse_low[lane] = lse.low * unit.exponent;
    s.delta[lane] = *row_of<const S>(space.delta, seq, panel.b, head, query);
  }
  if (s.few) {
    load_few_queries<E, T>(p, seq, panel, s.query_words, s.few_queries);
  } else {
    Columns<E, T>::pack(q, lanes, p.q.stride_d, int(p.head_dim), s.q_columns, kLanes);
  }
  Columns<E, T>::pack(dout, lanes, p.dout.stride_d, int(p.head_dim_v), s.dout_columns, kLanes);
  auto pack = [&](const T* const* rows, int64_t stride, int dim, typename E::Word* words) {
    words += place * Operands<E>::kPanelWords * kLanes;
    for (int d = 0; d < dim; d += kLanes, words += Operands<E>::kRow * kLanes)
      pack_rows(E{}, rows, lanes, stride, d, int(smaller(kLanes, dim - d)), words);
  };
  pack(q, p.q.stride_d, int(p.head_dim), s.q_rows);
  pack(dout, p.dout.stride_d, int(p.head_dim_v), s.dout_rows);
}

// What becomes of one vector of scores.
template <class V>
struct ScoreGrad {
  V prob;    // after dropout
  V dscore;  // by the score before bias, ALiBi and softcap are applied, without the factor scale
  V dbias;   // by the score after them
};

// What is the same for all scores of a lane.
template <class V>
struct ScoreTerms {
  V lse, minus_lse_low, delta;
  V exponent;       // what makes scores exponents of 2
  V factor;         // what makes products scores, to which the addend is added
  V into_cap, cap;  // scale / softcap, and softcap
  bool capped;

  template <class Scratch>
  ScoreTerms(const Params& p, const Scratch& s, int lane)
      : lse(V::load(s.lse + lane)),
        minus_lse_low(number(0) - V::load(s.lse_low + lane)),
        delta(V::load(s.delta + lane)),
        exponent(number(unit_of<typename V::Scalar>(p, s.folded).exponent)),
        factor(number(stay_products(p, s.folded) ? 1 : p.scale)),
        into_cap(number(p.softcap > 0 ? p.scale / p.softcap : 0)),
        cap(number(p.softcap)),
        capped(p.softcap > 0) {}
  static V number(double x) { return V::set(typename V::Scalar(x)); }
};

// addend: null in a plain step. factor: of dropout, or null. Scores are rounded as in the forward pass, so that they
// cancel against lse: no product and sum is fused that was not there.
template <class V>
inline ScoreGrad<V> score_grad(const ScoreTerms<V>& terms, const typename V::Scalar* score,
                               const typename V::Scalar* dprob, const typename V::Scalar* addend,
                               const typename V::Scalar* factor) {
  using S = typename V::Scalar;
  const V zero = V::set(S(0)), one = V::set(S(1)), raw = V::load(score);
  V x = raw, slope = one;
  if (addend != nullptr) {
    const V a = V::load(addend);
    if (terms.capped) {
      const V capped = tanh(raw * terms.into_cap);
      x = fma(capped, terms.cap, a);
      slope = one - capped * capped;
    } else {
      x = raw * terms.factor + a;
    }
  }
  ScoreGrad<V> g;
  const V prob = exp2(fma(x - terms.lse, terms.exponent, terms.minus_lse_low));
  V dp = V::load(dprob);
  g.prob = prob;
  if (factor != nullptr) {
    g.prob = prob * V::load(factor);
    dp = dp * V::load(factor);
  }
  g.dscore = g.dbias = prob * (dp - terms.delta);
  if (addend != nullptr) {
    g.dscore = g.dbias * slope;
    // A hidden pair may have been made of NaN.
    const auto hidden = equal(V::load(addend), V::set(S(-__builtin_inf())));
    g.prob = select(hidden, zero, g.prob);
    g.dbias = select(hidden, zero, g.dbias);
    g.dscore = select(hidden, zero, g.dscore);
  }
  return g;
}

// Stores a vector of lanes as words along the lanes.
template <class V>
void store_lanes(Single<V>, V x, typename V::Scalar* row, int lane) {
  x.store(row + lane);
}
#ifdef __AVX512BF16__
inline void store_lanes(Pairs, F32 x, uint32_t* row, int lane) { x.store(reinterpret_cast<bf16*>(row) + lane); }
#endif

// The operands of the products from one vector of lanes of the scores and the gradients of the probabilities. What may
// be null is so in all steps of most calls: calls with constants leave a loop without it.
template <class E>
inline void make_operands_of(const ScoreTerms<typename E::Vector>& terms, int keys, const typename E::Scalar* scores,
                             const typename E::Scalar* dprobs, const typename E::Scalar* addend,
                             const typename E::Scalar* factors, typename E::Scalar* dbias, int lane,
                             const Operands<E> to) {
  using V = typename E::Vector;
  constexpr int kLanes = Panel<V>::kLanes, kRow = Operands<E>::kRow;
  V before = V::set(0);
  for (int n = 0; n < keys; ++n) {
    const int at = n * kLanes + lane;
    const ScoreGrad<V> g = score_grad<V>(terms, scores + at, dprobs + at, addend ? addend + at : nullptr,
                                         factors ? factors + at : nullptr);
    if (dbias != nullptr) (V::load(dbias + at) + g.dbias).store(dbias + at);
    store_lanes(E{}, g.prob, to.probs + n * kRow, lane);
    store_lanes(E{}, g.dscore, to.dscores + n * kRow, lane);
    if constexpr (E::kPerWord == 1) {
      g.dscore.store(to.dscores_key + at);
    } else {
      if (n % 2 == 1) store_pairs(before, g.dscore, to.dscores_key + n / 2 * kLanes + lane);
      if (n % 2 == 0 && n + 1 == keys) store_pairs(g.dscore, V::set(0), to.dscores_key + n / 2 * kLanes + lane);
      before = g.dscore;
    }
  }
}

template <class E>
void make_operands(const Params& p, const BackwardScratch<E>& s, int vectors, int keys,
                   const typename E::Scalar* addend, const typename E::Scalar* factors, typename E::Scalar* dbias,
                   const Operands<E>& to) {
  using V = typename E::Vector;
  for (int lane = 0; lane < vectors * V::kWidth; lane += V::kWidth) {
    const ScoreTerms<V> terms(p, s, lane);
    const typename E::Scalar *scores = s.scores, *dprobs = s.dprobs;
    if (addend == nullptr && factors == nullptr && dbias == nullptr) {
      make_operands_of<E>(terms, keys, scores, dprobs, nullptr, nullptr, nullptr, lane, to);
    } else {
      make_operands_of<E>(terms, keys, scores, dprobs, addend, factors, dbias, lane, to);
    }
  }
}

// C[key][dim] gets words[key][lane word] * rows[lane word][dim], the products over queries; rows and C in columns, see
// BackwardScratch.
template <class E, Update kUpdate>
void gemm_over_lanes(int keys, int lanes, const typename E::Word* words, const typename E::Word* rows, int dim,
                     typename E::Scalar* c) {
  using V = typename E::Vector;
  constexpr int kRow = Operands<E>::kRow, kLanes = kLanesOf<V>;
  for (int d = 0; d < dim; d += kLanes, rows += kRow * kLanes, c += kBlockKeys * kLanes) {
    auto product = dim - d > V::kWidth ? gemm<E, 2, kUpdate> : gemm<E, 1, kUpdate>;
    product(keys, lanes / E::kPerWord, words, kRow, rows, c, nullptr);
  }
}

// Scores and what follows from them, for keys n0 .. n0 + keys (row `at` of the block) and one panel. Returns false if
// nothing is visible. gaps: some key is seen by no row.
template <class E, class T, int kVectors>
bool backward_scores(const Params& p, const Sequence& seq, const Panel<typename E::Vector>& panel,
                     BackwardScratch<E>& s, int at, int64_t n0, int keys, typename E::Scalar* dbias,
                     const Operands<E>& to, bool& gaps) {
  using S = typename E::Scalar;
  const bool plain = can_be_plain(p, s.folded) && panel.all.first <= n0 && n0 + keys <= panel.all.last;
  gaps = false;
  if (!plain && !make_addend(p, seq, panel, n0, keys, s.folded, s.addend, gaps)) return false;
  if (s.few) {
    static_assert(kFewRows<typename E::Vector> <= E::Vector::kWidth);
    for (int n = 0; n < keys; ++n) E::Vector::set(S(0)).store(s.scores + n * Panel<typename E::Vector>::kLanes);
    few_scores<E, T>(s.few_queries, s.query_words, panel.count, int(p.head_dim),
                     reinterpret_cast<const T* const*>(s.few_keys + at), keys, s.scores, nullptr, 0);
  } else {
    make_scores<E, kVectors>(p, seq, panel, n0, keys, s.k + at * s.k_stride, s.k_stride,
                             words_of(int(p.head_dim), E::kPerWord), s.q_columns, s.scores, nullptr);
  }
  gemm<E, kVectors, Update::kStore>(keys, words_of(int(p.head_dim_v), E::kPerWord), s.v + at * s.v_stride, s.v_stride,
                                    s.dout_columns, s.dprobs);
  const S* factors = nullptr;
  if (p.dropout_threshold != 0) {
    make_dropout(p, panel, n0, keys, S(p.dropout_scale), s.factors);
    factors = s.factors;
  }
  make_operands(p, s, kVectors, keys, plain ? nullptr : s.addend.values, factors, dbias, to);
  return true;
}

// One step up to dQ, which the panel's first step begins; what dK and dV need is left in the operands. Returns false,
// and has done nothing, if nothing is visible.
template <class E, class T, int kVectors>
bool backward_step(const Params& p, const Sequence& seq, const Panel<typename E::Vector>& panel, BackwardScratch<E>& s,
                   int at, int64_t n0, int keys, const Operands<E>& operands, bool begins, typename E::Scalar* dq) {
  const int dim = int(p.head_dim);
  bool gaps = false;
  if (!backward_scores<E, T, kVectors>(p, seq, panel, s, at, n0, keys, nullptr, operands, gaps)) return false;
  if (p.dq.data == nullptr) return true;
  ColumnTiles<E> k = s.k_keys.from(at / E::kPerWord);
  if (gaps) k = without_gaps<E>(k, keys, dim, s.addend.seen, s.gapless);
  auto product = begins ? gemm_over_keys<E, kVectors, Update::kStore> : gemm_over_keys<E, kVectors, Update::kAdd>;
  product(dim, keys, k, operands.dscores_key, dq, s.half_word, nullptr);
  return true;
}

// dV and dK of keys [first, last) of the block from the rows of panels place .. place + lanes / kLanes of the group.
template <class E, Update kUpdate>
void make_key_grads(const Params& p, const BackwardScratch<E>& s, int first, int last, int place, int lanes) {
  if (first >= last) return;
  constexpr int kLanes = kLanesOf<typename E::Vector>;
  const Operands<E> from = s.operands.at(first, place);
  const int row = place * Operands<E>::kPanelWords * kLanes, key = first * kLanes;
  if (p.dv.data != nullptr)
    gemm_over_lanes<E, kUpdate>(last - first, lanes, from.probs, s.dout_rows + row, int(p.head_dim_v), s.dv + key);
  if (p.dk.data != nullptr)
    gemm_over_lanes<E, kUpdate>(last - first, lanes, from.dscores, s.q_rows + row, int(p.head_dim), s.dk + key);
}

template <class S>
void clear(S* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = S(0);
}

// A block of keys against a group of panels, the first of which holds the rows from first_row on. The job's first block
// begins the panels' dQ, and the first group the block's dK and dV: by storing what the others add.
template <class E, class T>
void backward_group(const Params& p, const Sequence& seq, const BackwardJob& job, const BackwardSpace& space,
                    BackwardScratch<E>& s, int64_t n0, int keys, int64_t first_row, int64_t rows,
                    typename E::Scalar* dq) {
  using V = typename E::Vector;
  constexpr int kLanes = Panel<V>::kLanes;
  int first[kGroupPanels<E>], last[kGroupPanels<E>], lanes[kGroupPanels<E>];  // keys seen, and rows
  const bool first_block = n0 == job.keys.first, first_group = first_row == 0;
  int panels = 0, all_first = 0, all_last = keys, all_lanes = 0;
  for (; panels < kGroupPanels<E> && first_row < rows; ++panels, first_row += kLanes, dq += p.head_dim * kLanes) {
    Panel<V> panel;
    set_panel(panel, p, seq, job.b, group_of(p, job.head_kv), first_row, rows - first_row, {n0, n0 + keys});
    bool seen = panel.any.first < panel.any.last;
    if (seen) {
      load_panel<E, T>(p, seq, panel, panels, space, s);
      const int at = int(panel.any.first - n0) / E::kPerWord * E::kPerWord, used = int(panel.any.last - n0) - at;
      const Operands<E> to = s.operands.at(at, panels);
      seen = panel.vectors == 2 ? backward_step<E, T, 2>(p, seq, panel, s, at, n0 + at, used, to, first_block, dq)
                                : backward_step<E, T, 1>(p, seq, panel, s, at, n0 + at, used, to, first_block, dq);
      first[panels] = at;
      last[panels] = at + used;
    }
    if (!seen) {
      first[panels] = last[panels] = 0;
      if (first_block && p.dq.data != nullptr) clear(dq, p.head_dim * kLanes);
    }
    lanes[panels] = panel.vectors * V::kWidth;
    all_lanes += lanes[panels];
    all_first = int(larger(all_first, first[panels]));
    all_last = int(smaller(all_last, last[panels]));
  }
  all_last = int(larger(all_first, all_last));
  if (first_group && all_first == 0 && all_last == keys) {
    make_key_grads<E, Update::kStore>(p, s, 0, keys, 0, all_lanes);
    return;
  }
  if (first_group) {
    for (int64_t d = 0; d < p.head_dim; d += kLanes) clear(s.dk + d * kBlockKeys, keys * kLanes);
    for (int64_t d = 0; d < p.head_dim_v; d += kLanes) clear(s.dv + d * kBlockKeys, keys * kLanes);
  }
  make_key_grads<E, Update::kAdd>(p, s, all_first, all_last, 0, all_lanes);
  for (int i = 0; i < panels; ++i) {  // keys that not all panels see
    make_key_grads<E, Update::kAdd>(p, s, first[i], int(smaller(last[i], all_first)), i, lanes[i]);
    make_key_grads<E, Update::kAdd>(p, s, int(larger(first[i], all_last)), last[i], i, lanes[i]);
  }
}

// Stores scale * grads, which are dk or dv of a block.
template <class V, class T>
void store_key_grads(const Params& p, const View& view, const Sequence& seq, const BackwardJob& job, int64_t n0,
                     int keys, int dim, const typename V::Scalar* grads, typename V::Scalar scale) {
  if (view.data == nullptr) return;
  constexpr int kLanes = kLanesOf<V>;
  for (int n = 0; n < keys; ++n) {
    T* row = key_row<T>(p, view, seq, job.b, job.head_kv, n0 + n);
    for (int d = 0; d < dim; d += V::kWidth) {
      const typename V::Scalar* from = grads + (int64_t(d / kLanes) * kBlockKeys + n) * kLanes + d % kLanes;
      store_some(V::load(from) * V::set(scale), int(smaller(V::kWidth, dim - d)), row + d * view.stride_d,
                 view.stride_d);
    }
  }
}

template <class E, class T>
void backward_job(const Params& p, const BackwardJob& job, const BackwardSpace& space, void* memory) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  Arena arena(memory);
  BackwardScratch<E> s(p, arena);
  const Sequence seq = sequence_of(p, job.b);
  set_sequence(p, seq, s);
  const HeadGroup heads = group_of(p, job.head_kv);
  const int64_t rows = seq.q_length * heads.count, panels = (rows + kLanes - 1) / kLanes, dq_size = p.head_dim * kLanes;
  S* dq = static_cast<S*>(space.dq) + (job.part * space.panels + job.first_panel) * dq_size;
  if (p.dq.data != nullptr && job.keys.first >= job.keys.last) clear(dq, panels * dq_size);
  for (int64_t n0 = job.keys.first; n0 < job.keys.last; n0 += kBlockKeys) {
    const int keys = int(smaller(kBlockKeys, job.keys.last - n0));
    load_backward_block(s, static_cast<const T*>(nullptr), p, seq, job.b, job.head_kv, n0, keys,
                        p.dq.data != nullptr ? panels : 0);
    int64_t i = 0;
    do {  // a group without rows gives zeros
      backward_group<E, T>(p, seq, job, space, s, n0, keys, i * kLanes, rows, dq + i * dq_size);
    } while ((i += kGroupPanels<E>) < panels);
    store_key_grads<V, T>(p, p.dk, seq, job, n0, keys, int(p.head_dim), s.dk, S(p.scale));
    store_key_grads<V, T>(p, p.dv, seq, job, n0, keys, int(p.head_dim_v), s.dv, S(1));
  }
}

template <class E>
size_t backward_scratch(const Params& p) {
  Arena arena(nullptr);
  BackwardScratch<E> scratch(p, arena);
  return arena.used();
}

// a * b, summed up in lanes; the same whatever the strides.
template <class V, class T>
V row_product(const T* a, int64_t stride_a, const T* b, int64_t stride_b, int dim) {
  using S = typename V::Scalar;
  auto part = [&](const T* row, int64_t stride, int d) {
    if (stride == 1) return load_some<V>(row + d, dim - d);
    S values[V::kWidth] = {};
    for (int i = 0; i < V::kWidth && d + i < dim; ++i) values[i] = S(to_float(row[(d + i) * stride]));
    return V::load(values);
  };
  V sums = V::set(S(0));
  for (int d = 0; d < dim; d += V::kWidth) sums = fma(part(a, stride_a, d), part(b, stride_b, d), sums);
  return sums;
}

// delta = rowsum(dout * out) - dlse of one head of a sequence; out with what rounding took from it, see Results in
// fastattn/backends/__init__.py. -dlse for queries that saw nothing, whose dout may hold anything.
template <class V, class T>
void delta_job(const Params& p, const BackwardSpace& space, int64_t b, int64_t head) {
  using S = typename V::Scalar;
  const Sequence seq = sequence_of(p, b);
  const View residual = out_residual(p);
  for (int64_t i = 0; i < seq.q_length; i += V::kWidth) {
    const int rows = int(smaller(V::kWidth, seq.q_length - i));
    V products[V::kWidth];
    for (int r = 0; r < V::kWidth; ++r) {
      products[r] = V::set(S(0));
      if (r >= rows || saw_nothing<S, T>(p, seq, b, head, i + r)) continue;
      const T* dout = row_of<const T>(p.dout, seq, b, head, i + r);
      auto with_dout = [&](const View& view) {
        return row_product<V>(row_of<const T>(view, seq, b, head, i + r), view.stride_d, dout, p.dout.stride_d,
                              int(p.head_dim_v));
      };
      products[r] = with_dout(p.out);
      if (residual.data != nullptr)
        products[r] = fma(with_dout(residual), V::set(S(1) / S(kResidualScale)), products[r]);
    }
    S totals[V::kWidth];
    sum_of_lanes(products).store(totals);
    for (int r = 0; r < rows; ++r) {
      if (p.dlse.data != nullptr) totals[r] -= *row_of<const S>(p.dlse, seq, b, head, i + r);
      *row_of<S>(space.delta, seq, b, head, i + r) = totals[r];
    }
  }
}

// dq of one sequence and key/value head: the sum over the parts, turned back into rows.
template <class V, class T>
void sum_dq_job(const Params& p, const BackwardJob& job, const BackwardSpace& space) {
  using S = typename V::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const Sequence seq = sequence_of(p, job.b);
  const HeadGroup heads = group_of(p, job.head_kv);
  const int64_t rows = seq.q_length * heads.count, dq_size = p.head_dim * kLanes;
  const S* first = static_cast<const S*>(space.dq) + job.first_panel * dq_size;
  const V scale = V::set(S(p.scale));
  for (int64_t row = 0; row < rows; row += V::kWidth) {
    const int count = int(smaller(V::kWidth, rows - row));
    const S* from = first + row / kLanes * dq_size + row % kLanes;
    T* to[V::kWidth];
    for (int i = 0; i < count; ++i)
      to[i] = row_of<T>(p.dq, seq, job.b, heads.first + (row + i) % heads.count, (row + i) / heads.count);
    store_columns<V>(
        int(p.head_dim), count,
        [&](int d) {
          V sum = V::load(from + d * kLanes);
          for (int64_t part = 1; part < space.parts; ++part)
            sum = sum + V::load(from + part * space.panels * dq_size + d * kLanes);
          return sum * scale;
        },
        to, p.dq.stride_d);
  }
}

// dsinks of one head: -sum of exp(sink - lse) * delta over all its rows, in order.
template <class V>
void dsinks_job(const Params& p, const BackwardSpace& space, int64_t head) {
  using S = typename V::Scalar;
  const S sink = static_cast<const S*>(p.sinks.data)[head * p.sinks.stride_h];
  double sum = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence seq = sequence_of(p, b);
    for (int64_t i = 0; i < seq.q_length; ++i) {
      const Twofold<S> lse = load_lse<S>(p, seq, b, head, i);
      if (lse.high == S(-__builtin_inf())) continue;
      const double share = __builtin_exp((double(sink) - double(lse.high)) - double(lse.low));
      sum -= share * double(*row_of<const S>(space.delta, seq, b, head, i));
    }
  }
  static_cast<S*>(p.dsinks.data)[head * p.dsinks.stride_h] = S(sum);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
