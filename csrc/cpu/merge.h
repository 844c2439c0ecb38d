// Merging results over parts of the keys, in the order of the parts.
#pragma once

#include "forward.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class V, class T>
void merge_job(const Params& p, const ForwardJob& job, const Parts& parts) {
  using S = typename V::Scalar;
  const S lowest = S(-__builtin_inf());
  const Sequence seq = sequence_of(p, job.b);
  const int64_t group = p.heads_q / p.heads_kv;
  const int dim_v = int(p.head_dim_v);
  const S* outs = static_cast<const S*>(parts.out);
  const S* lses = static_cast<const S*>(parts.lse);
  for (int64_t r = 0; r < job.rows; ++r) {
    const int64_t row = job.first_row + r, at = job.first_part_row + r;
    const int64_t query = row / group, head = job.head_kv * group + row % group;
    S row_max = lowest;
    for (int64_t part = 0; part < parts.count; ++part) {
      const S lse = lses[part * parts.rows_total + at];
      if (lse > row_max || lse != lse) row_max = lse;  // NaN is taken over, and kept
    }
    const bool empty = row_max == lowest;
    S row_sum = S(0);
    for (int64_t part = 0; part < parts.count && !empty; ++part)
      row_sum += S(__builtin_exp2(double(lses[part * parts.rows_total + at] - row_max)));
    if (!empty && p.sinks.data != nullptr) {
      S factor = S(1);
      add_sink(static_cast<const S*>(p.sinks.data)[head * p.sinks.stride_h] * S(kLog2E), row_max, row_sum, factor);
    }
    S weights[kMaxParts];
    for (int64_t part = 0; part < parts.count && !empty; ++part)
      weights[part] = S(__builtin_exp2(double(lses[part * parts.rows_total + at] - row_max))) / row_sum;
    T* out = row_of<T>(p.out, seq, job.b, head, query);
    T* low = p.out_low.data == nullptr ? nullptr : row_of<T>(p.out_low, seq, job.b, head, query);
    for (int d = 0; d < dim_v; d += V::kWidth) {
      const int columns = int(smaller(V::kWidth, dim_v - d));
      V sum = V::set(S(0));
      for (int64_t part = 0; part < parts.count && !empty; ++part) {
        const int64_t source = part * parts.rows_total + at;
        if (lses[source] == lowest) continue;
        S values[V::kWidth] = {};
        copy_row<V>(outs + source * dim_v + d, 1, columns, values);
        sum = fma(V::load(values), V::set(weights[part]), sum);
      }
      store_some(sum, columns, out + d * p.out.stride_d, p.out.stride_d);
      if (low != nullptr) store_some(low_part<T>(sum), columns, low + d * p.out_low.stride_d, p.out_low.stride_d);
    }
    if (p.lse.data != nullptr)
      *row_of<S>(p.lse, seq, job.b, head, query) = empty ? lowest : (row_max + log2_of(row_sum)) * S(kLn2);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
