// The two element types: 16 bits in memory, products accumulated in float32.
#pragma once

#include <cstdint>

#include "../../call/params.h"
#include "../ptx/arithmetic.h"
#include "../ptx/matrix.h"

namespace fastattn {
namespace cuda {

struct BFloat16 {
  // What the probabilities of one lane may sum to before row_max is raised. They have the range of float32; the bound
  // keeps sums far from its end.
  static constexpr float kLargestSum = 1e9f;
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return ptx::cvt_rn_bf16x2(low, high); }
  static __device__ __forceinline__ float2 unpack(uint32_t two) {
    return {__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u)};
  }
  // d = a b + c
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                             const float (&c)[4]) {
    ptx::mma_m16n8k16_bf16(d, a, b0, b1, c);
  }
};

struct Float16 {
  static constexpr float kLargestSum = 3e4f;  // each probability must stay below 65504
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return ptx::cvt_rn_f16x2(low, high); }
  static __device__ __forceinline__ float2 unpack(uint32_t two) {
    return {ptx::cvt_f32_f16(static_cast<uint16_t>(two)), ptx::cvt_f32_f16(static_cast<uint16_t>(two >> 16))};
  }
  // d = a b + c
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                             const float (&c)[4]) {
    ptx::mma_m16n8k16_f16(d, a, b0, b1, c);
  }
};

// The rounding error of numbers stored as Element, times kResidualScale, itself stored as Element. 0 where it is not
// finite.
template <class Element>
struct RoundingError {
  static __device__ __forceinline__ uint32_t pack(float x, float y) {
    const float2 rounded = Element::unpack(Element::pack(x, y));
    return Element::pack(scaled_error(x, rounded.x), scaled_error(y, rounded.y));
  }

 private:
  static __device__ __forceinline__ float scaled_error(float x, float rounded) {
    const float error = (x - rounded) * kResidualScale;
    return fabsf(error) < INFINITY ? error : 0.0f;
  }
};

}  // namespace cuda
}  // namespace fastattn
