// What changes a score: scale, softcap and ALiBi. Scores are in units of log2, so that a probability is one exp2.
#pragma once

#include "../ptx/arithmetic.h"
#include "arguments.h"

namespace fastattn {
namespace cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// tanh, within 4 units in the last place of float32. Near 0 the quotient would cancel; there the series is exact.
__device__ __forceinline__ float tanh_of(float x) {
  const float square = x * x;
  const float series = x * (1.0f + square * (-0.33333333f + square * 0.13333333f));
  const float e = ptx::ex2_approx(fminf(fabsf(x), 40.0f) * (2.0f * kLog2E));
  const float quotient = copysignf(1.0f - 2.0f * ptx::rcp_approx(e + 1.0f), x);
  return fabsf(x) < 0.1f ? series : x != x ? x : quotient;
}

// kHasScoreMod: with softcap and ALiBi. Without, a score is the product times scale_log2.
template <bool kHasScoreMod>
struct ScoreMod {
  const Arguments& a;  // in constant memory, where it takes no registers
  float slope;         // only with kHasScoreMod, in units of log2
  int offset;          // likewise

  __device__ __forceinline__ ScoreMod(const Arguments& a, int64_t b, int head, int diagonal_offset) : a(a) {
    if constexpr (kHasScoreMod) {
      const View& alibi = a.p.alibi;
      const float* slopes = static_cast<const float*>(alibi.data);
      // Varlen rows after the last sequence see nothing; there are no slopes for them.
      const bool given = slopes != nullptr && b < a.p.batch;
      slope = given ? slopes[b * alibi.stride_b + head * alibi.stride_h] * kLog2E : 0.0f;
      offset = diagonal_offset;
    }
  }

  // row, key: positions within the sequence.
  __device__ __forceinline__ float operator()(float product, int row, int key) const {
    if constexpr (kHasScoreMod) {
      const float score =
          a.softcap_log2 > 0 ? a.softcap_log2 * tanh_of(product * a.softcap_scale) : product * a.scale_log2;
      return score - distance(row, key);
    }
    return product * a.scale_log2;
  }

  // exp2(score - row_max). Without kHasScoreMod one multiply-add is enough for it.
  __device__ __forceinline__ float probability(float product, int row, int key, float row_max) const {
    if constexpr (kHasScoreMod) return ptx::ex2_approx((*this)(product, row, key) - row_max);
    return ptx::ex2_approx(fmaf(product, a.scale_log2, -row_max));
  }

  // The same, and the derivative of the score by the product, over the scale.
  __device__ __forceinline__ float probability(float product, int row, int key, float row_max, float& change) const {
    change = 1.0f;
    if constexpr (kHasScoreMod)
      if (a.softcap_log2 > 0) {
        const float capped = tanh_of(product * a.softcap_scale);
        change = 1.0f - capped * capped;
        return ptx::ex2_approx(a.softcap_log2 * capped - distance(row, key) - row_max);
      }
    return probability(product, row, key, row_max);
  }

 private:
  // What ALiBi subtracts from a score.
  __device__ __forceinline__ float distance(int row, int key) const { return slope * abs(row + offset - key); }
};

}  // namespace cuda
}  // namespace fastattn
