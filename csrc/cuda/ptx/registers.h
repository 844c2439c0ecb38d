// Hints to the compiler about registers.
#pragma once

#include <cstdint>

namespace fastattn {
namespace ptx {

// The same number, kept in a register from here on instead of being computed again where it is needed.
__device__ __forceinline__ uint32_t kept(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ int kept(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// threadIdx.x, read where it is needed: what follows from it is not kept in registers (PTX ISA 10.1).
__device__ __forceinline__ uint32_t thread_index() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

}  // namespace ptx
}  // namespace fastattn
