// Gradient of the sinks.
#pragma once

#include "bwd_preprocess.h"

namespace fastattn {
namespace FASTATTN_ISA {

// dsinks of one head: -sum of exp(sink - lse) * delta over all its rows, in order.
template <class V>
void bwd_dsinks_job(const Params& p, const BackwardBuffers& buffers, int64_t head) {
  using S = typename V::Scalar;
  const S sink = static_cast<const S*>(p.sinks.data)[head * p.sinks.stride_h];
  double sum = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence seq = sequence_of(p, b);
    for (int64_t i = 0; i < seq.q_length; ++i) {
      const Twofold<S> lse = load_lse<S>(p, seq, b, head, i);
      if (lse.high == S(-__builtin_inf())) continue;
      const double share = __builtin_exp((double(sink) - double(lse.high)) - double(lse.low));
      sum -= share * double(*row_of<const S>(buffers.delta, seq, b, head, i));
    }
  }
  static_cast<S*>(p.dsinks.data)[head * p.dsinks.stride_h] = S(sum);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
