// dV += P^T dO and dK += dS^T Q of a block of keys, summed over groups of panels.
#pragma once

#include "bwd_load.h"

namespace fastattn {
namespace FASTATTN_ISA {

// C[key][dim] gets words[key][lane word] * rows[lane word][dim], the products over queries; rows and C in columns, see
// BackwardScratch.
template <class E, Update kUpdate>
void gemm_over_lanes(int keys, int lanes, const typename E::Word* words, const typename E::Word* rows, int dim,
                     typename E::Scalar* c) {
  using V = typename E::Vector;
  constexpr int kRow = Operands<E>::kRow, kLanes = kLanesOf<V>;
  for (int d = 0; d < dim; d += kLanes, rows += kRow * kLanes, c += kBlockN * kLanes) {
    auto product = dim - d > V::kWidth ? gemm<E, 2, kUpdate> : gemm<E, 1, kUpdate>;
    product(keys, lanes / E::kPerWord, words, kRow, rows, c, nullptr);
  }
}

// Keys [first, last) of a block.
struct BlockKeys {
  int first, last;
};

// dV and dK of keys of the block from the rows of panels place .. place + lanes / kLanes of the group.
template <class E, Update kUpdate>
void add_dkdv(const BackwardContext<E>& c, BlockKeys keys, int place, int lanes) {
  const int count = keys.last - keys.first;
  if (count <= 0) return;
  constexpr int kLanes = kLanesOf<typename E::Vector>;
  const Params& p = c.kv.p;
  const Operands<E> from = c.s.operands.at(keys.first, place);
  const int row = place * Operands<E>::kPanelWords * kLanes, key = keys.first * kLanes;
  if (p.dv.data != nullptr)
    gemm_over_lanes<E, kUpdate>(count, lanes, from.probs, c.s.dout_rows + row, int(p.head_dim_v), c.s.dv + key);
  if (p.dk.data != nullptr)
    gemm_over_lanes<E, kUpdate>(count, lanes, from.dscores, c.s.q_rows + row, int(p.head_dim), c.s.dk + key);
}

template <class E>
void clear_dkdv(const BackwardContext<E>& c, int keys) {
  constexpr int kLanes = kLanesOf<typename E::Vector>;
  for (int64_t d = 0; d < c.kv.p.head_dim; d += kLanes) clear(c.s.dk + d * kBlockN, keys * kLanes);
  for (int64_t d = 0; d < c.kv.p.head_dim_v; d += kLanes) clear(c.s.dv + d * kBlockN, keys * kLanes);
}

// Stores scale * grads, which are dk or dv of a block: `dim` columns.
template <class V, class T>
void store_key_grads(const KVHead& kv, const View& view, KeyTile tile, int dim, const typename V::Scalar* grads,
                     typename V::Scalar scale) {
  if (view.data == nullptr) return;
  constexpr int kLanes = kLanesOf<V>;
  for (int n = 0; n < tile.count; ++n) {
    T* row = key_row<T>(kv, view, tile.n_begin + n);
    for (int d = 0; d < dim; d += V::kWidth) {
      const typename V::Scalar* from = grads + (int64_t(d / kLanes) * kBlockN + n) * kLanes + d % kLanes;
      store_partial(V::load(from) * V::set(scale), int(smaller(V::kWidth, dim - d)), row + d * view.stride_d,
                    view.stride_d);
    }
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
