// Recomputes probabilities and makes the gradients of scores: the operands of dQ, dK and dV, and dbias.
#pragma once

#include "bwd_load.h"

namespace fastattn {
namespace FASTATTN_ISA {

// What becomes of one vector of scores.
template <class V>
struct ScoreGrad {
  V prob;    // after dropout
  V dscore;  // by the score before bias, ALiBi and softcap are applied, without the factor scale
  V dbias;   // by the score after them
};

// What is the same for all scores of a vector of lanes.
template <class V>
struct LaneConstants {
  V lse, neg_lse_low, delta;
  V exponent;       // makes scores exponents of 2
  V factor;         // makes products scores, to which the terms are added
  V into_cap, cap;  // scale / softcap, and softcap
  bool has_softcap;

  template <class E>
  LaneConstants(const BackwardContext<E>& c, int lane)
      : lse(V::load(c.s.lse + lane)),
        neg_lse_low(V::set(0) - V::load(c.s.lse_low + lane)),
        delta(V::load(c.s.delta + lane)),
        exponent(V::set(c.mod.unit.exponent)),
        factor(V::set(c.mod.factor)),
        into_cap(V::set(c.mod.into_cap)),
        cap(V::set(c.mod.cap)),
        has_softcap(c.mod.has_softcap) {}
};

// terms: null in a full tile. factor: of dropout, or null. Scores are rounded as in the forward pass, so that they
// cancel against lse: a product and a sum are fused only where the forward pass fuses them.
template <class V>
inline ScoreGrad<V> score_grad(const LaneConstants<V>& lanes, const typename V::Scalar* score,
                               const typename V::Scalar* dprob, const typename V::Scalar* terms,
                               const typename V::Scalar* factor) {
  using S = typename V::Scalar;
  const V zero = V::set(S(0)), one = V::set(S(1)), raw = V::load(score);
  V x = raw, slope = one;
  if (terms != nullptr) {
    const V a = V::load(terms);
    if (lanes.has_softcap) {
      const V capped = tanh(raw * lanes.into_cap);
      x = fma(capped, lanes.cap, a);
      slope = one - capped * capped;
    } else {
      x = raw * lanes.factor + a;
    }
  }
  ScoreGrad<V> g;
  const V prob = exp2(fma(x - lanes.lse, lanes.exponent, lanes.neg_lse_low));
  V dp = V::load(dprob);
  g.prob = prob;
  if (factor != nullptr) {
    g.prob = prob * V::load(factor);
    dp = dp * V::load(factor);
  }
  g.dscore = g.dbias = prob * (dp - lanes.delta);
  if (terms != nullptr) {
    g.dscore = g.dbias * slope;
    // A hidden pair may have been made of NaN.
    const auto hidden = equal(V::load(terms), V::set(S(-__builtin_inf())));
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

// A tile's scores and what its gradients are made of, [key][kLanes].
template <class E>
struct GradTile {
  using S = typename E::Scalar;
  int keys;
  const S *scores, *dprobs;
  const S* terms;    // null in a full tile
  const S* factors;  // of dropout, or null
  S* dbias;          // to add to, or null
};

// The operands of the products from one vector of lanes. kSimple: what may be null is null, as in all steps of most
// calls; its loop has no branches.
template <class E, bool kSimple>
inline void make_operands_of(const LaneConstants<typename E::Vector>& lanes, const GradTile<E> tile, int lane,
                             const Operands<E> to) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  constexpr int kLanes = Panel<V>::kLanes, kRow = Operands<E>::kRow;
  const S *scores = tile.scores, *dprobs = tile.dprobs;
  const S *terms = kSimple ? nullptr : tile.terms, *factors = kSimple ? nullptr : tile.factors;
  S* dbias = kSimple ? nullptr : tile.dbias;
  const int keys = tile.keys;
  V before = V::set(0);
  for (int n = 0; n < keys; ++n) {
    const int at = n * kLanes + lane;
    const ScoreGrad<V> g =
        score_grad<V>(lanes, scores + at, dprobs + at, terms ? terms + at : nullptr, factors ? factors + at : nullptr);
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
void make_operands(const BackwardContext<E>& c, int vectors, const GradTile<E>& tile, const Operands<E>& to) {
  using V = typename E::Vector;
  const bool simple = tile.terms == nullptr && tile.factors == nullptr && tile.dbias == nullptr;
  for (int lane = 0; lane < vectors * V::kWidth; lane += V::kWidth) {
    const LaneConstants<V> lanes(c, lane);
    if (simple) {
      make_operands_of<E, true>(lanes, tile, lane, to);
    } else {
      make_operands_of<E, false>(lanes, tile, lane, to);
    }
  }
}

// Scores of a tile of the block, computed as the forward pass did.
template <class E, class T, int kVectors>
void recompute_scores(const BackwardContext<E>& c, const BackwardBlock<E>& block,
                      const MaskedPanel<typename E::Vector>& panel, KeyTile tile) {
  using V = typename E::Vector;
  const BackwardScratch<E>& s = c.s;
  const int at = int(tile.n_begin - block.tile.n_begin);
  if (!c.decode) {
    make_scores<E, kVectors>(c.kv, c.mod, panel, tile, block.k.from(at), s.q_columns, s.scores, nullptr);
    return;
  }
  static_assert(kDecodeRows<V> <= V::kWidth);
  for (int n = 0; n < tile.count; ++n) V::set(0).store(s.scores + n * Panel<V>::kLanes);
  decode_scores<E, T>({s.decode_queries, panel.count, s.query_words, int(c.kv.p.head_dim)},
                      reinterpret_cast<const T* const*>(s.decode_keys + at), tile.count, s.scores, {nullptr, 0});
}

// One tile of the block and one panel, up to the operands `to`. dbias: the tile's gradient to add to, or null. Does
// nothing if nothing is visible.
template <class E, class T, int kVectors>
Visibility backward_scores(const BackwardContext<E>& c, const BackwardBlock<E>& block,
                           const MaskedPanel<typename E::Vector>& panel, KeyTile tile, const Operands<E>& to,
                           typename E::Scalar* dbias) {
  using S = typename E::Scalar;
  const Params& p = c.kv.p;
  const BackwardScratch<E>& s = c.s;
  const bool full = c.mod.keeps_products && panel.mask.is_full(tile);
  Visibility visible{true, false};
  if (!full) visible = make_masked_terms(c.kv, panel, tile, c.mod, s.terms);
  if (!visible.any) return visible;
  recompute_scores<E, T, kVectors>(c, block, panel, tile);
  const KeyRows<E> v = block.v.from(tile.n_begin - block.tile.n_begin);
  gemm<E, kVectors, Update::kStore>(tile.count, words_of(int(p.head_dim_v), E::kPerWord), v.data, v.stride,
                                    s.dout_columns, s.dprobs);
  const bool dropout = p.dropout_threshold != 0;
  if (dropout) make_dropout(p, panel, tile, S(p.dropout_scale), s.factors);
  const S* terms = full ? nullptr : s.terms.values;
  make_operands(c, kVectors, GradTile<E>{tile.count, s.scores, s.dprobs, terms, dropout ? s.factors : nullptr, dbias},
                to);
  return visible;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
