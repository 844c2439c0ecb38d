// Online softmax (Milakov and Gimelshein, 2018) of a panel: running row_max and row_sum, rescaled from tile to tile.
#pragma once

#include "dropout.h"
#include "score_mod.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class V>
struct OnlineSoftmax {
  typename V::Scalar row_max[Panel<V>::kLanes], row_sum[Panel<V>::kLanes];
  typename V::Scalar rescale[Panel<V>::kLanes];  // the last step's factor of everything before it
  bool begun;                                    // a step has written the panel's acc

  void reset() {
    using S = typename V::Scalar;
    begun = false;
    for (int lane = 0; lane < Panel<V>::kLanes; ++lane) {
      row_max[lane] = S(-__builtin_inf());
      row_sum[lane] = S(0);
    }
  }
};

// Scores and probs of a tile [key][kLanes].
template <class E>
struct SoftmaxTile {
  typename E::Scalar* scores;
  typename E::Word* probs;              // words along the keys; may be the memory of scores
  TileTerms<typename E::Vector> terms;  // of a masked tile
  typename E::Scalar* factors;          // of dropout
};

// The maximum per lane.
template <class V, int kVectors>
void column_maximum(const typename V::Scalar* scores, int keys, typename V::Scalar* highest) {
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

// One step: scores become probs, relative to the new maximum. full_max: of a full tile, whose products are the scores,
// their maximum per lane; null for a masked tile.
template <class E, int kVectors>
void softmax_step(const Params& p, const ScoreMod<typename E::Scalar>& mod, const Panel<typename E::Vector>& panel,
                  KeyTile tile, const typename E::Scalar* full_max, const SoftmaxTile<E>& buffers,
                  OnlineSoftmax<typename E::Vector>& state) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  const V scale = V::set(mod.unit.exponent), lowest = V::set(S(-__builtin_inf()));
  const bool dropout = p.dropout_threshold != 0;
  const int keys = tile.count;
  // 1 / (1 - p) comes last: words of half precision round nothing more for it.
  if (dropout) make_dropout(p, panel, tile, S(1), buffers.factors);
  for (int lane = 0; lane < kVectors * V::kWidth; lane += V::kWidth) {
    S* scores = buffers.scores + lane;
    typename E::Word* probs = buffers.probs + lane;
    const V highest = full_max != nullptr ? V::load(full_max + lane)
                                          : modify_scores<V>(mod, scores, buffers.terms.values + lane, keys);
    const V old = V::load(state.row_max + lane), now = max(highest, old);
    now.store(state.row_max + lane);
    // While a row has seen nothing its maximum is -inf; 0 stands in, as -inf - (-inf) is NaN.
    const V shift = select(equal(now, lowest), V::set(S(0)), now), rescale = exp2((old - shift) * scale);
    rescale.store(state.rescale + lane);
    // Two calls: a constant leaves a loop without dropout.
    const V sum = dropout ? exponentials<E>(scores, scale, shift, buffers.factors + lane, keys, probs)
                          : exponentials<E>(scores, scale, shift, nullptr, keys, probs);
    fma(V::load(state.row_sum + lane), rescale, sum).store(state.row_sum + lane);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
