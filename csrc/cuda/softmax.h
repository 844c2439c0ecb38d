// The state of an online softmax over the rows of one warp: what lane t of a quad knows of its two rows per 16.
//
// A probability is exp2(score - reference). The reference of a row need not be its maximum: any number works that is
// near enough for nothing to overflow, so most blocks leave it alone and only watch the sums (see `fits`). Each lane
// sums its own columns; the four lanes of a row meet at the end.
#pragma once

#include "ptx/arithmetic.h"
#include "scores.h"

namespace fastattn {
namespace cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

template <int kRowTiles>
struct Softmax {
  // A score may exceed the reference by this much, in units of log2, before the row is rescaled: probabilities up to
  // 256 lose no accuracy, and few rows ever grow that much after their first keys.
  static constexpr float kSlack = 8.0f;

  float reference[kRowTiles][2];  // -inf: the row has seen no key
  float sum[kRowTiles][2];        // of this lane's columns

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) reference[m][r] = -INFINITY, sum[m][r] = 0.0f;
  }

  // True in all lanes if each row of the warp has a reference.
  __device__ __forceinline__ bool ready() const {
    bool set = true;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) set = set && reference[m][0] > -INFINITY && reference[m][1] > -INFINITY;
    return __all_sync(kWholeWarp, set);
  }

  // What to subtract from scores: a row without a reference has none but -inf.
  __device__ __forceinline__ float base(int m, int r) const {
    return reference[m][r] == -INFINITY ? 0.0f : reference[m][r];
  }

  // Renews the references if a score of this lane's two columns in each of two 16 x 8 products is too large for them,
  // and rescales what has been summed up to here.
  template <int kTiles>
  __device__ __forceinline__ void renew(const float (&scores)[kRowTiles][2][4], float (&acc)[kRowTiles][kTiles][4]) {
    float top[kRowTiles][2];
    bool grown = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[m][r] = fmaxf(fmaxf(scores[m][0][2 * r], scores[m][0][2 * r + 1]),
                          fmaxf(scores[m][1][2 * r], scores[m][1][2 * r + 1]));
        grown = grown || top[m][r] > reference[m][r] + kSlack;
      }
    if (!__any_sync(kWholeWarp, grown)) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float renewed = fmaxf(reference[m][r], quad_max(top[m][r]));
        const float factor = reference[m][r] == -INFINITY ? 0.0f : ptx::ex2_approx(reference[m][r] - renewed);
        reference[m][r] = renewed;
        sum[m][r] *= factor;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) acc[m][n][2 * r] *= factor, acc[m][n][2 * r + 1] *= factor;
      }
  }
};

// How a row ends: what its accumulated values are multiplied by, and its lse in units of log2. The sink, in the same
// units, is one more probability without a value; a row that sees no key has none of it either.
struct RowEnd {
  float factor, lse;

  __device__ __forceinline__ RowEnd(float reference, float row_sum, bool with_sink, float sink) {
    if (reference == -INFINITY && row_sum == 0.0f) {
      factor = 0.0f, lse = -INFINITY;
      return;
    }
    float correction = 1.0f;
    if (with_sink) {
      const float top = fmaxf(reference, sink);
      correction = ptx::ex2_approx(reference - top);
      row_sum = row_sum * correction + ptx::ex2_approx(sink - top);
      reference = top;
    }
    factor = correction / row_sum;
    lse = reference + log2f(row_sum);
  }
};

}  // namespace cuda
}  // namespace fastattn
