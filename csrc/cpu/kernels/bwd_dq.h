// dQ^T += K^T dS^T. Each split of the keys has an addend of dQ, in panels of columns; a last step sums them.
#pragma once

#include "bwd_load.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Adds a tile's contribution to a panel's dq [head_dim][kLanes], or stores it if it `begins`.
template <class E, int kVectors>
void add_dq(const BackwardContext<E>& c, const BackwardBlock<E>& block, KeyTile tile, bool gaps, bool begins,
            typename E::Scalar* dq) {
  const int dim = int(c.kv.p.head_dim), at = int(tile.n_begin - block.tile.n_begin);
  ColumnTiles<E> k = block.k_keys.from(at / E::kPerWord);
  if (gaps) k = without_gaps<E>(k, tile.count, dim, c.s.terms.seen, c.s.gapless);
  auto product = begins ? gemm_over_keys<E, kVectors, Update::kStore> : gemm_over_keys<E, kVectors, Update::kAdd>;
  product(dim, tile.count, k, c.s.operands.dscores_key, dq, c.s.half_word, nullptr);
}

// dq of one sequence and key/value head: the sum over the splits, transposed into rows.
template <class V, class T>
void sum_dq_job(const Params& p, const BackwardJob& job, const BackwardBuffers& buffers) {
  using S = typename V::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const Sequence seq = sequence_of(p, job.b);
  const HeadGroup heads = group_of(p, job.head_kv);
  const int64_t rows = seq.q_length * heads.count, dq_size = p.head_dim * kLanes;
  const S* first = static_cast<const S*>(buffers.dq_accum) + job.first_panel * dq_size;
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
          for (int64_t split = 1; split < buffers.splits; ++split)
            sum = sum + V::load(from + split * buffers.panels * dq_size + d * kLanes);
          return sum * scale;
        },
        to, p.dq.stride_d);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
