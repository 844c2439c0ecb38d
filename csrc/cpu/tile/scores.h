// Products of q and k, in the orientation S^T = K Q^T: lanes are queries.
#pragma once

#include "key_block.h"
#include "online_softmax.h"

namespace fastattn {
namespace FASTATTN_ISA {

// scores[key][kLanes] of a tile whose keys begin at k, with ALiBi and bias where these are folded in. full_max: null,
// or where the maximum per lane of a full tile goes.
template <class E, int kVectors>
void make_scores(const KVHead& kv, const ScoreMod<typename E::Scalar>& mod, const Panel<typename E::Vector>& panel,
                 KeyTile tile, KeyRows<E> k, const typename E::Word* queries, typename E::Scalar* scores,
                 typename E::Scalar* full_max) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const int keys = tile.count, words = words_of(int(kv.p.head_dim), E::kPerWord);
  if (mod.folded) {
    make_terms(kv.p, kv.seq, panel, tile, S(1 / kv.p.scale), scores);
    gemm<E, kVectors, Update::kAdd>(keys, words, k.data, k.stride, queries, scores);
  } else if (E::kPerWord == 1 &&
             full_max != nullptr) {  // in one pass, by which the faster products of pairs gain nothing
    for (int lane = 0; lane < kLanes; ++lane) full_max[lane] = S(-__builtin_inf());
    gemm<E, kVectors, Update::kStoreMax>(keys, words, k.data, k.stride, queries, scores, full_max);
    return;
  } else {
    gemm<E, kVectors, Update::kStore>(keys, words, k.data, k.stride, queries, scores);
  }
  if (full_max != nullptr) column_maximum<V, kVectors>(scores, keys, full_max);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
