// Hints to the compiler about registers; no instruction.
#pragma once

#include <cstdint>

namespace fastattn {
namespace ptx {

// The same number, which from here on is kept in a register, not computed anew where it is needed.
__device__ __forceinline__ uint32_t kept(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ int kept(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace ptx
}  // namespace fastattn
