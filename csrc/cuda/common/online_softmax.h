// The state of an online softmax (Milakov and Gimelshein, 2018) over the rows of one warp: what lane t of a quad knows
// of its two rows per 16.
//
// A probability is exp2(score - row_max). row_max may lag behind the largest score: any number works that is near
// enough for nothing to overflow. So most blocks leave it alone and only watch the sums (see `fits`). Each lane sums
// its own columns; the four lanes of a row meet at the end.
#pragma once

#include "../ptx/arithmetic.h"
#include "score_mod.h"

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
struct OnlineSoftmax {
  float row_max[kRowTiles][2];  // -inf: the row has seen no key
  float row_sum[kRowTiles][2];  // of this lane's columns

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) row_max[m][r] = -INFINITY, row_sum[m][r] = 0.0f;
  }

  // True in all lanes if each row of the warp has a row_max.
  __device__ __forceinline__ bool ready() const {
    bool set = true;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) set = set && row_max[m][0] > -INFINITY && row_max[m][1] > -INFINITY;
    return __all_sync(kWholeWarp, set);
  }

  // Scores to probabilities. A row without a row_max has no score except -inf.
  __device__ __forceinline__ void probabilities(float (&scores)[kRowTiles][2][4]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float base = row_max[m][r] == -INFINITY ? 0.0f : row_max[m][r];  // -inf - -inf would be NaN
#pragma unroll
        for (int i = 0; i < 4; ++i)
          scores[m][i / 2][2 * r + i % 2] = ptx::ex2_approx(scores[m][i / 2][2 * r + i % 2] - base);
      }
  }

  // Adds probabilities of two 16 x 8 products to `sums`.
  static __device__ __forceinline__ void accumulate(float (&sums)[kRowTiles][2],
                                                    const float (&probs)[kRowTiles][2][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[m][e % 4 / 2] += probs[m][e / 4][e % 4];
  }

  __device__ __forceinline__ void update(const float (&sums)[kRowTiles][2]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) row_sum[m][0] += sums[m][0], row_sum[m][1] += sums[m][1];
  }

  // True in all lanes if none of the probabilities in `sums` can have been too large.
  static __device__ __forceinline__ bool fits(const float (&sums)[kRowTiles][2], float limit) {
    bool fit = true;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) fit = fit && sums[m][0] < limit && sums[m][1] < limit;
    return __all_sync(kWholeWarp, fit);
  }

  // The largest of a row's scores in two 16 x 8 products.
  static __device__ __forceinline__ float largest(const float (&scores)[2][4], int r) {
    return quad_max(
        fmaxf(fmaxf(scores[0][2 * r], scores[0][2 * r + 1]), fmaxf(scores[1][2 * r], scores[1][2 * r + 1])));
  }

  // Takes row_max from first scores.
  __device__ __forceinline__ void start(const float (&scores)[kRowTiles][2][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) row_max[m][r] = largest(scores[m], r);
  }

  // Raises row_max to the largest of these scores, two columns of each of two 16 x 8 products, and rescales row_sum and
  // acc to it.
  template <int kTiles>
  __device__ __forceinline__ void rescale(const float (&scores)[kRowTiles][2][4], float (&acc)[kRowTiles][kTiles][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float raised = fmaxf(row_max[m][r], largest(scores[m], r));
        const float factor = row_max[m][r] == -INFINITY ? 0.0f : ptx::ex2_approx(row_max[m][r] - raised);
        row_max[m][r] = raised;
        row_sum[m][r] *= factor;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) acc[m][n][2 * r] *= factor, acc[m][n][2 * r + 1] *= factor;
      }
  }
};

// How a row ends: the factor of its accumulated values, and its lse in units of log2.
struct RowEnd {
  float factor, lse;
};

// The sink, in units of log2 and -inf for none, is one more probability without a value.
__device__ __forceinline__ RowEnd finalize(float row_max, float row_sum, float sink) {
  const bool nothing = row_max == -INFINITY && row_sum == 0.0f;  // a row of NaN has no row_max, but a row_sum
  const bool empty = nothing && sink == -INFINITY;
  const float top = fmaxf(row_max, sink);
  const float correction = ptx::ex2_approx(row_max - top);
  const float total = row_sum * correction + ptx::ex2_approx(sink - top);
  RowEnd end;
  end.factor = nothing ? 0.0f : correction * ptx::rcp_approx(total);
  end.lse = empty ? -INFINITY : top + ptx::lg2_approx(total);
  return end;
}

}  // namespace cuda
}  // namespace fastattn
