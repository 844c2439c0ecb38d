// Merging results over parts of the keys, in the order of the parts.
#pragma once

#include "decode.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class V, class T>
void merge_job(const Params& p, const ForwardJob& job, const Parts& parts) {
  using S = typename V::Scalar;
  const S lowest = S(-__builtin_inf());
  const Sequence seq = sequence_of(p, job.b);
  const Unit<S> unit = unit_of<S>(p, folds_terms(p) && !few_rows<V>(p, seq));
  const int64_t group = p.heads_q / p.heads_kv;
  const int dim_v = int(p.head_dim_v);
  const S* outs = static_cast<const S*>(parts.out);
  const S* maxima = static_cast<const S*>(parts.row_max);
  const S* sums = static_cast<const S*>(parts.row_sum);
  for (int64_t r = 0; r < job.rows; ++r) {
    const int64_t row = job.first_row + r, at = job.first_part_row + r;
    const int64_t query = row / group, head = job.head_kv * group + row % group;
    auto source = [&](int64_t part) { return part * parts.rows_total + at; };
    S row_max = lowest, row_sum = S(0), weights[kMaxParts] = {};
    for (int64_t part = 0; part < parts.count; ++part)
      if (maxima[source(part)] > row_max) row_max = maxima[source(part)];
    for (int64_t part = 0; part < parts.count; ++part) {
      if (sums[source(part)] == S(0)) continue;  // its maximum is -inf, perhaps that of all
      const double difference = double(maxima[source(part)] - row_max) * double(unit.exponent);
      weights[part] = S(__builtin_exp2(difference)) * sums[source(part)];
      row_sum += weights[part];
    }
    const RowEnd<S> end(unit, row_max, row_sum, sink_of<S>(p, job.b, head), p.lse.data != nullptr);
    for (S& weight : weights) weight *= end.factor;
    T* out = row_of<T>(p.out, seq, job.b, head, query);
    const View residual = out_residual(p);
    T* rest = residual.data == nullptr ? nullptr : row_of<T>(residual, seq, job.b, head, query);
    for (int d = 0; d < dim_v; d += V::kWidth) {
      const int columns = int(smaller(V::kWidth, dim_v - d));
      V sum = V::set(S(0));
      for (int64_t part = 0; part < parts.count; ++part) {
        if (sums[source(part)] == S(0)) continue;
        S values[V::kWidth] = {};
        copy_row<V>(outs + source(part) * dim_v + d, 1, columns, values);
        sum = fma(V::load(values), V::set(weights[part]), sum);
      }
      store_some(sum, columns, out + d * p.out.stride_d, p.out.stride_d);
      const V low = end.saw_nothing ? V::set(S(__builtin_inf())) : rounded_off<T>(sum);
      if (rest != nullptr) store_some(low, columns, rest + d * residual.stride_d, residual.stride_d);
    }
    store_lse(p, seq, job.b, head, query, end);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
