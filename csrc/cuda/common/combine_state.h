// Merging the softmax over disjoint sets of keys into the one over all of them, exactly: the formula of
// fastattn/merge.py, in units of log2.
//
// A part of the keys gives a row a reference, the sum of its probabilities exp2(score - reference), and values weighted
// by these. A finished result is such a part too, with its lse, 1 and out.
#pragma once

#include "../ptx/arithmetic.h"

namespace fastattn {
namespace cuda {

struct Merge {
  float top = -INFINITY;  // the largest reference; NaN is passed over here, and comes back in the weights
  float sum = 0.0f;       // of all probabilities, relative to `top`

  // Takes note of a part; all of them, before anything is weighed.
  __device__ __forceinline__ void see(float reference) { top = fmaxf(top, reference); }

  // What a part's sum and values count for; nothing if it saw no key.
  __device__ __forceinline__ float weight(float reference) const {
    return ptx::ex2_approx(reference - (top == -INFINITY ? 0.0f : top));
  }
};

}  // namespace cuda
}  // namespace fastattn
