// Extending a cache in place, and rotary position embedding (Su et al., 2021) on the way.
#pragma once

#include "../tile/panel.h"

namespace fastattn {
namespace FASTATTN_ISA {

// to = from, turned by the angles of a position. from and to may be the same row.
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
void append_job(const Params& p, int64_t b, int64_t head_kv) {
  const Sequence seq = sequence_of(p, b);
  for (int64_t t = 0; t < p.seqlen_new; ++t) {
    const int64_t position = p.kv_lengths[b] + t;
    const T* k_new =
        static_cast<const T*>(p.k_new.data) + b * p.k_new.stride_b + head_kv * p.k_new.stride_h + t * p.k_new.stride_s;
    const T* v_new =
        static_cast<const T*>(p.v_new.data) + b * p.v_new.stride_b + head_kv * p.v_new.stride_h + t * p.v_new.stride_s;
    rotate_row<S>(p, k_new, p.k_new.stride_d, position, key_row<T>(p, p.k, seq, b, head_kv, position), p.k.stride_d);
    T* v = key_row<T>(p, p.v, seq, b, head_kv, position);
    for (int64_t d = 0; d < p.head_dim_v; ++d) v[d * p.v.stride_d] = v_new[d * p.v_new.stride_d];
  }
}

template <class S, class T>
void rotate_queries_job(const Params& p, const View& to, int64_t b, int64_t head) {
  const Sequence seq = sequence_of(p, b);
  for (int64_t i = 0; i < p.seqlen_q; ++i) {
    // A query before the first position (more queries than keys) sees nothing: any angle will do.
    const int64_t position = larger(i + seq.offset, 0);
    rotate_row<S>(p, row_of<const T>(p.q, seq, b, head, i), p.q.stride_d, position, row_of<T>(to, seq, b, head, i),
                  to.stride_d);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
