// Combines the results of splits of the keys, in the order of the splits.
#pragma once

#include "../tile/decode_products.h"
#include "epilogue.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The weights of a row's splits.
template <class S>
struct SplitWeights {
  S row_max, row_sum, weights[kMaxSplits] = {};

  // at: the row's place in the results of a split. Splits that saw nothing weigh 0.
  SplitWeights(const Splits& splits, int64_t at, const Unit<S>& unit) : row_max(S(-__builtin_inf())), row_sum(S(0)) {
    const S* maxima = static_cast<const S*>(splits.row_max) + at;
    const S* sums = static_cast<const S*>(splits.row_sum) + at;
    for (int64_t split = 0; split < splits.count; ++split)
      if (maxima[split * splits.rows_total] > row_max) row_max = maxima[split * splits.rows_total];
    for (int64_t split = 0; split < splits.count; ++split) {
      const int64_t i = split * splits.rows_total;
      if (sums[i] == S(0)) continue;  // its maximum is -inf, perhaps that of all
      const double difference = double(maxima[i] - row_max) * double(unit.exponent);
      weights[split] = S(__builtin_exp2(difference)) * sums[i];
      row_sum += weights[split];
    }
  }
};

template <class V, class T>
void combine_job(const Params& p, const ForwardJob& job, const Splits& splits) {
  using S = typename V::Scalar;
  const Sequence seq = sequence_of(p, job.b);
  const Unit<S> unit = ScoreMod<S>(p, is_decode<V>(p, seq)).unit;
  const HeadGroup heads = group_of(p, job.head_kv);
  const int dim_v = int(p.head_dim_v);
  const View residual = out_residual(p);
  const S* sums = static_cast<const S*>(splits.row_sum);
  for (int64_t r = 0; r < job.rows; ++r) {
    const int64_t row = job.first_row + r, at = job.first_accum_row + r;
    const int64_t query = row / heads.count, head = heads.first + row % heads.count;
    SplitWeights<S> w(splits, at, unit);
    const S sink = sink_of<S>(p, job.b, head);
    const FinalRow<S> end = finalize(unit, w.row_max, w.row_sum, sink, p.lse.data != nullptr);
    for (S& weight : w.weights) weight *= end.factor;
    T* out = row_of<T>(p.out, seq, job.b, head, query);
    T* rest = residual.data == nullptr ? nullptr : row_of<T>(residual, seq, job.b, head, query);
    for (int d = 0; d < dim_v; d += V::kWidth) {
      const int columns = int(smaller(V::kWidth, dim_v - d));
      V sum = V::set(S(0));
      for (int64_t split = 0; split < splits.count; ++split) {
        const int64_t from = split * splits.rows_total + at;
        if (sums[from] == S(0)) continue;
        S values[V::kWidth] = {};
        copy_row<V>(static_cast<const S*>(splits.out_accum) + from * dim_v + d, 1, columns, values);
        sum = fma(V::load(values), V::set(w.weights[split]), sum);
      }
      store_partial(sum, columns, out + d * p.out.stride_d, p.out.stride_d);
      const V low = end.saw_nothing ? V::set(S(__builtin_inf())) : rounding_error<T>(sum);
      if (rest != nullptr) store_partial(low, columns, rest + d * residual.stride_d, residual.stride_d);
    }
    store_lse(p, seq, job.b, head, query, end);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
