// How rows of the forward pass end: finalize, out, lse and their residuals.
#pragma once

#include "../jobs.h"
#include "../tile/online_softmax.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The sink of a head, -inf if there is none. Rows after the last sequence of a varlen call belong to no sequence and
// have none.
template <class S>
S sink_of(const Params& p, int64_t b, int64_t head) {
  if (p.sinks.data == nullptr || b >= p.batch) return S(-__builtin_inf());
  return static_cast<const S*>(p.sinks.data)[head * p.sinks.stride_h];
}

template <class S>
struct FinalRow {
  Twofold<S> lse;  // set if it is wanted or there is a sink
  S factor;        // of the accumulated outputs; 0 if the row saw nothing
  bool saw_nothing;
};

template <class S>
FinalRow<S> finalize(const Unit<S>& unit, S row_max, S row_sum, S sink, bool lse_wanted) {
  FinalRow<S> row;
  // Not by the maximum, in which NaN can be lost: a row that saw anything has a sum of at least 1, or NaN.
  row.saw_nothing = row_sum == S(0);
  S share = S(1);
  if (lse_wanted || sink != S(-__builtin_inf())) {
    row.lse = row.saw_nothing ? Twofold<S>{S(-__builtin_inf()), S(0)} : log_sum(unit, row_max, row_sum);
    share = add_sink(sink, row.lse);
  }
  row.factor = row.saw_nothing ? S(0) : share / row_sum;
  return row;
}

// Writes lse of a query, and the rounding error of lse: inf if the query saw nothing.
template <class S>
void store_lse(const Params& p, const Sequence& seq, int64_t b, int64_t head, int64_t query, const FinalRow<S>& row) {
  if (p.lse.data == nullptr) return;
  *row_of<S>(p.lse, seq, b, head, query) = row.lse.high;
  const View residual = lse_residual(p);
  if (residual.data != nullptr)
    *row_of<S>(residual, seq, b, head, query) = row.saw_nothing ? S(__builtin_inf()) : row.lse.low;
}

// The place of a row in a split's results.
inline int64_t accum_row(const ForwardJob& job, const Splits& splits, int64_t row) {
  return job.split * splits.rows_total + job.first_accum_row + row;
}
template <class S>
S* out_accum_row(const Params& p, const ForwardJob& job, const Splits& splits, int64_t row) {
  return static_cast<S*>(splits.out_accum) + accum_row(job, splits, row) * p.head_dim_v;
}

// Ends the softmax of a panel: writes lse, or in a split of the keys row_max and row_sum. factors: of the accumulated
// outputs, 0 for a row that saw nothing. A sink counts once: not in splits, but when they are combined.
template <class V>
void finalize_panel(const KVHead& kv, const Unit<typename V::Scalar>& unit, const Panel<V>& panel,
                    const ForwardJob& job, const Splits& splits, int64_t first_row, const OnlineSoftmax<V>& state,
                    typename V::Scalar* factors) {
  using S = typename V::Scalar;
  const Params& p = kv.p;
  const S kept = p.dropout_threshold != 0 ? S(p.dropout_scale) : S(1);
  const int64_t at = accum_row(job, splits, first_row);
  for (int lane = 0; lane < Panel<V>::kLanes; ++lane) {
    factors[lane] = S(0);
    if (lane >= panel.count) continue;
    const S row_max = state.row_max[lane], row_sum = state.row_sum[lane];
    const bool whole = job.split < 0;
    const S sink = whole ? sink_of<S>(p, panel.b, panel.head[lane]) : S(-__builtin_inf());
    const FinalRow<S> row = finalize(unit, row_max, row_sum, sink, whole && p.lse.data != nullptr);
    factors[lane] = row.factor * kept;
    if (whole) {
      store_lse(p, kv.seq, panel.b, panel.head[lane], panel.query[lane], row);
    } else {
      static_cast<S*>(splits.row_max)[at + lane] = row_max;
      static_cast<S*>(splits.row_sum)[at + lane] = row_sum;
    }
  }
}

// The error of rounding x to T, times kResidualScale; 0 where that gives no finite number.
template <class T, class V>
V rounding_error(V x) {
  T high[V::kWidth];
  x.store(high);
  const V low = (x - V::load(high)) * V::set(kResidualScale);
  return select(less(abs(low), V::set(typename V::Scalar(__builtin_inf()))), low, V::set(0));
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
