// Loads and stores, in the order in which they are written: the compiler moves none past another.
#pragma once

#include <cstdint>

namespace fastattn {
namespace ptx {

// 16 bytes from global memory; zeros where `valid` is false, and then the source is not read (PTX ISA 9.7.9.8).
__device__ __forceinline__ void ld_global_16(uint32_t (&r)[4], const void* global, bool valid) {
  asm volatile(
      "{\n"
      "  .reg .pred p;\n"
      "  setp.ne.b32 p, %5, 0;\n"
      "  mov.b32 %0, 0;\n"
      "  mov.b32 %1, 0;\n"
      "  mov.b32 %2, 0;\n"
      "  mov.b32 %3, 0;\n"
      "  @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(r[0]), "=&r"(r[1]), "=&r"(r[2]), "=&r"(r[3])
      : "l"(global), "r"(static_cast<int>(valid))
      : "memory");
}

// 16 bytes to kOffset bytes from `shared` (PTX ISA 9.7.9.11).
template <int kOffset = 0>
__device__ __forceinline__ void st_shared_16(uint32_t shared, const uint32_t (&r)[4]) {
  asm volatile("st.shared.v4.b32 [%0 + %5], {%1, %2, %3, %4};" ::"r"(shared), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3]), "n"(kOffset)
               : "memory");
}

// 16 bytes from shared memory, read each time. Without `volatile` the assembler would keep them in registers instead
// (PTX ISA 9.7.9.8).
__device__ __forceinline__ void ld_shared_16(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ld.volatile.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// 4 bytes to `shared` (PTX ISA 9.7.9.11).
__device__ __forceinline__ void st_shared_4(uint32_t shared, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(x) : "memory");
}

}  // namespace ptx
}  // namespace fastattn
