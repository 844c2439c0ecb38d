// Gradient of the bias, in a pass of its own.
//
// Each job owns a tile of the bias and goes through everything that shares it by broadcasting (batches, heads, rows,
// keys) in a fixed order. So sums over broadcast dimensions need neither atomics nor copies of the bias. Cost: the
// first two of the backward's five products once more.
#pragma once

#include "bwd_scores.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Writes one tile: rows and keys of the accumulated [key][lane] gradients, or their sum where the bias is broadcast.
template <class V>
void store_dbias(const Params& p, const DbiasJob& job, const typename V::Scalar* grads) {
  using S = typename V::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const View& view = p.dbias;
  const bool one_row = p.dbias_size[2] == 1, one_key = p.dbias_size[3] == 1;
  const int rows = int(smaller(kLanes, p.dbias_size[2] - job.first_row)),
            keys = int(smaller(kBlockN, p.dbias_size[3] - job.first_key));
  S* to = static_cast<S*>(view.data) + job.b * view.stride_b + job.h * view.stride_h + job.first_row * view.stride_s +
          job.first_key * view.stride_d;
  for (int r = 0; r < (one_row ? 1 : rows); ++r) {
    for (int n = 0; n < (one_key ? 1 : keys); ++n) {
      S sum = S(0);
      for (int i = r; i < (one_row ? kLanes : r + 1); ++i)
        for (int j = n; j < (one_key ? kBlockN : n + 1); ++j) sum += grads[j * kLanes + i];
      to[r * view.stride_s + n * view.stride_d] = sum;
    }
  }
}

// Adds the gradients of one block of keys and the rows [first_row, last_row) of a head.
template <class E, class T>
void add_dbias(const BackwardContext<E>& c, int64_t head, int64_t first_row, int64_t last_row, KeyTile tile) {
  using V = typename E::Vector;
  const BackwardScratch<E>& s = c.s;
  const BackwardBlock<E> block = load_backward_block<E, T>(c, tile, 0);
  for (int64_t row = first_row; row < last_row; row += Panel<V>::kLanes) {
    MaskedPanel<V> panel;
    set_panel(panel, c.kv, {head, 1}, row, last_row - row, {tile.n_begin, tile.n_end()});
    if (!panel.mask.sees_keys()) continue;
    load_panel<E, T>(c, panel, 0);
    auto scores = panel.vectors == 2 ? backward_scores<E, T, 2> : backward_scores<E, T, 1>;
    scores(c, block, panel, tile, s.operands.at(0, 0), s.dbias);
  }
}

template <class E, class T>
void bwd_dbias_job(const Params& p, const DbiasJob& job, const BackwardBuffers& buffers, void* memory) {
  using V = typename E::Vector;
  constexpr int kLanes = Panel<V>::kLanes;
  Arena arena(memory);
  const BackwardScratch<E> s(p, arena);
  clear(s.dbias, kBlockN * kLanes);
  const int64_t b_end = p.dbias_size[0] == 1 ? p.batch : job.b + 1,
                h_end = p.dbias_size[1] == 1 ? p.heads_q : job.h + 1;
  for (int64_t b = job.b; b < b_end; ++b) {
    const Sequence seq = sequence_of(p, b);
    const int64_t last_row = p.dbias_size[2] == 1 ? seq.q_length : smaller(seq.q_length, job.first_row + kLanes);
    const int64_t last_key = p.dbias_size[3] == 1 ? seq.k_length : smaller(seq.k_length, job.first_key + kBlockN);
    for (int64_t head = job.h; head < h_end; ++head) {
      const BackwardContext<E> c({p, seq, b, head / (p.heads_q / p.heads_kv)}, buffers, s);
      for (int64_t n_begin = job.first_key; n_begin < last_key; n_begin += kBlockN)
        add_dbias<E, T>(c, head, job.first_row, last_row, {n_begin, int(smaller(kBlockN, last_key - n_begin))});
    }
  }
  store_dbias<V>(p, job, s.dbias);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
