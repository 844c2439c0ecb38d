// Appends keys and values to a cache in place, with rotary position embedding (Su et al., 2021) of the keys.
#pragma once

#include "../simd/simd.h"
#include "../tile/integers.h"
#include "../tile/rows.h"

namespace fastattn {
namespace FASTATTN_ISA {

// to = from, rotated by the angles of a position. from and to may be the same row.
template <class S, class T>
void rotate_row(const Params& p, const T* from, int64_t from_stride, int64_t position, T* to, int64_t to_stride) {
  const int64_t half = p.rotary_dim / 2;
  const S* cos = static_cast<const S*>(p.cos) + position * half;
  const S* sin = static_cast<const S*>(p.sin) + position * half;
  for (int64_t i = 0; i < half; ++i) {
    const int64_t first = p.rotary_interleaved ? 2 * i : i, second = p.rotary_interleaved ? 2 * i + 1 : i + half;
    const S x = S(to_float(from[first * from_stride])), y = S(to_float(from[second * from_stride]));
    from_float(x * cos[i] - y * sin[i], to[first * to_stride]);
    from_float(y * cos[i] + x * sin[i], to[second * to_stride]);
  }
  for (int64_t d = p.rotary_dim; d < p.head_dim; ++d) to[d * to_stride] = from[d * from_stride];
}

template <class S, class T>
void append_kv_job(const Params& p, int64_t b, int64_t head_kv) {
  const Sequence seq = sequence_of(p, b);
  const KVHead kv{p, seq, b, head_kv};
  for (int64_t t = 0; t < p.seqlen_new; ++t) {
    const int64_t position = p.kv_lengths[b] + t;
    auto new_row = [&](const View& view) {
      return static_cast<const T*>(view.data) + b * view.stride_b + head_kv * view.stride_h + t * view.stride_s;
    };
    rotate_row<S>(p, new_row(p.k_new), p.k_new.stride_d, position, key_row<T>(kv, p.k, position), p.k.stride_d);
    const T* v_new = new_row(p.v_new);
    T* v = key_row<T>(kv, p.v, position);
    for (int64_t d = 0; d < p.head_dim_v; ++d) v[d * p.v.stride_d] = v_new[d * p.v_new.stride_d];
  }
}

template <class S, class T>
void rotate_queries_job(const Params& p, const View& to, int64_t b, int64_t head) {
  const Sequence seq = sequence_of(p, b);
  for (int64_t i = 0; i < p.seqlen_q; ++i) {
    // A query before the first position (more queries than keys) sees nothing: its angle does not matter.
    const int64_t position = larger(i + seq.offset, 0);
    rotate_row<S>(p, row_of<const T>(p.q, seq, b, head, i), p.q.stride_d, position, row_of<T>(to, seq, b, head, i),
                  to.stride_d);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
