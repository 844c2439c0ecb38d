// float16 as GPUs of compute capability 7.5 compute with it.
#pragma once

#include <cstdint>

#include "../common/element.h"
#include "../ptx/arithmetic.h"
#include "../ptx/matrix.h"

namespace fastattn {
namespace cuda {
namespace sm75 {

struct Float16 : cuda::Float16 {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return ptx::cvt_rn_f16(low) | static_cast<uint32_t>(ptx::cvt_rn_f16(high)) << 16;
  }
  // d = a b + c. The operands of m16n8k16 are those of two products of half the depth, side by side.
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                             const float (&c)[4]) {
    ptx::mma_m16n8k8_f16(d, a[0], a[1], b0, c);
    ptx::mma_m16n8k8_f16(d, a[2], a[3], b1, d);
  }
};

}  // namespace sm75
}  // namespace cuda
}  // namespace fastattn
