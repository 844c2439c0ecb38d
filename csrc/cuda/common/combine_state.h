// Combines the softmax over disjoint sets of keys into the softmax over all of them, exactly. The formula is that of
// fastattn/merge.py, in units of log2.
//
// A set of keys gives a row its row_max, its row_sum of probabilities exp2(score - row_max), and values weighted by
// these. A finished result is such a set too: its lse, 1 and out.
#pragma once

#include "../ptx/arithmetic.h"

namespace fastattn {
namespace cuda {

struct CombineState {
  float row_max = -INFINITY;  // the largest of all; NaN is passed over here, and comes back in the weights
  float row_sum = 0.0f;       // of all probabilities, relative to row_max

  // All sets must be seen before any is weighed.
  __device__ __forceinline__ void update_max(float other) { row_max = fmaxf(row_max, other); }

  // The factor of a set's row_sum and values; 0 if it saw no key.
  __device__ __forceinline__ float weight(float other) const {
    return ptx::ex2_approx(other - (row_max == -INFINITY ? 0.0f : row_max));
  }
};

}  // namespace cuda
}  // namespace fastattn
