// What the backward pass reads of each row before its products: delta, lse and whether the row saw a key.
#pragma once

#include "../jobs.h"
#include "../simd/math.h"
#include "../tile/lse.h"
#include "../tile/pack.h"
#include "../tile/rows.h"

namespace fastattn {
namespace FASTATTN_ISA {

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

// a * b, summed up in lanes; the same whatever the strides.
template <class V, class T>
V row_product(const T* a, int64_t stride_a, const T* b, int64_t stride_b, int dim) {
  using S = typename V::Scalar;
  auto load = [&](const T* row, int64_t stride, int d) {
    if (stride == 1) return load_padded<V>(row + d, dim - d);
    S values[V::kWidth] = {};
    for (int i = 0; i < V::kWidth && d + i < dim; ++i) values[i] = S(to_float(row[(d + i) * stride]));
    return V::load(values);
  };
  V sums = V::set(S(0));
  for (int d = 0; d < dim; d += V::kWidth) sums = fma(load(a, stride_a, d), load(b, stride_b, d), sums);
  return sums;
}

// delta = rowsum(dout * out) - dlse of one head of a sequence; out with its rounding error, see Results in
// fastattn/backends/base.py. -dlse for queries that saw nothing, whose dout may hold anything.
template <class V, class T>
void bwd_preprocess_job(const Params& p, const BackwardBuffers& buffers, int64_t b, int64_t head) {
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
      *row_of<S>(buffers.delta, seq, b, head, i + r) = totals[r];
    }
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
