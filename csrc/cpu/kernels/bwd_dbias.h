// Gradient of the bias, in a pass of its own: each job owns a tile of the bias and goes through everything that shares
// it by broadcasting (batches, heads, rows, keys) in a fixed order. So sums over broadcast dimensions need neither
// atomics nor copies of the bias. Cost: the first two of the backward's five products once more.
#pragma once

#include "backward.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Writes one tile: rows and keys of the accumulated [key][lane] gradients, or their sum where the bias is broadcast.
template <class V>
void store_dbias(const Params& p, const BiasJob& job, int rows, int keys, const typename V::Scalar* grads) {
  using S = typename V::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const View& view = p.dbias;
  const bool one_row = p.dbias_size[2] == 1, one_key = p.dbias_size[3] == 1;
  S* to = static_cast<S*>(view.data) + job.b * view.stride_b + job.h * view.stride_h + job.first_row * view.stride_s +
          job.first_key * view.stride_d;
  for (int r = 0; r < (one_row ? 1 : rows); ++r) {
    for (int n = 0; n < (one_key ? 1 : keys); ++n) {
      S sum = S(0);
      for (int i = r; i < (one_row ? kLanes : r + 1); ++i)
        for (int j = n; j < (one_key ? kBlockKeys : n + 1); ++j) sum += grads[j * kLanes + i];
      to[r * view.stride_s + n * view.stride_d] = sum;
    }
  }
}

template <class E, class T>
void dbias_job(const Params& p, const BiasJob& job, const BackwardSpace& space, void* memory) {
  using V = typename E::Vector;
  constexpr int kLanes = Panel<V>::kLanes;
  Arena arena(memory);
  BackwardScratch<E> s(p, arena);
  clear(s.dbias, kBlockKeys * kLanes);
  const int64_t b_end = p.dbias_size[0] == 1 ? p.batch : job.b + 1,
                h_end = p.dbias_size[1] == 1 ? p.heads_q : job.h + 1;
  for (int64_t b = job.b; b < b_end; ++b) {
    const Sequence seq = sequence_of(p, b);
    set_sequence(p, seq, s);
    const int64_t last_row = p.dbias_size[2] == 1 ? seq.q_length : smaller(seq.q_length, job.first_row + kLanes);
    const int64_t last_key = p.dbias_size[3] == 1 ? seq.k_length : smaller(seq.k_length, job.first_key + kBlockKeys);
    for (int64_t head = job.h; head < h_end; ++head) {
      for (int64_t n0 = job.first_key; n0 < last_key; n0 += kBlockKeys) {
        const int keys = int(smaller(kBlockKeys, last_key - n0));
        load_backward_block(s, static_cast<const T*>(nullptr), p, seq, b, head / (p.heads_q / p.heads_kv), n0, keys, 0);
        for (int64_t row = job.first_row; row < last_row; row += kLanes) {
          Panel<V> panel;
          set_panel(panel, p, seq, b, {head, 1}, row, last_row - row, {n0, n0 + keys});
          if (panel.any.first >= panel.any.last) continue;
          load_panel<E, T>(p, seq, panel, 0, space, s);
          bool gaps = false;
          if (panel.vectors == 2) {
            backward_scores<E, T, 2>(p, seq, panel, s, 0, n0, keys, s.dbias, s.operands.at(0, 0), gaps);
          } else {
            backward_scores<E, T, 1>(p, seq, panel, s, 0, n0, keys, s.dbias, s.operands.at(0, 0), gaps);
          }
        }
      }
    }
  }
  const int rows = int(smaller(kLanes, p.dbias_size[2] - job.first_row)),
            keys = int(smaller(kBlockKeys, p.dbias_size[3] - job.first_key));
  store_dbias<V>(p, job, rows, keys, s.dbias);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
