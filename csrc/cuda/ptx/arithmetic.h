// Single instructions of arithmetic that C++ has no name for, or only a slower one.
#pragma once

#include <cstdint>

namespace fastattn {
namespace ptx {

// 2^x, within 2 units in the last place; 0 for -inf (PTX ISA 9.7.3.21).
__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x); -inf for 0 (PTX ISA 9.7.3.20).
__device__ __forceinline__ float lg2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, within 1 unit in the last place (PTX ISA 9.7.3.13).
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to nearest into one register, `low` in its lower half (PTX ISA 9.7.9.22, sm_80 and up).
__device__ __forceinline__ uint32_t cvt_rn_bf16x2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ uint32_t cvt_rn_f16x2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// One number rounded to nearest, as its bits (PTX ISA 9.7.9.22).
__device__ __forceinline__ uint16_t cvt_rn_f16(float x) {
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

// float16, as its bits, to float32 (PTX ISA 9.7.9.22).
__device__ __forceinline__ float cvt_f32_f16(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

}  // namespace ptx
}  // namespace fastattn
