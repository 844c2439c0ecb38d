// Copies from global to shared memory that run while the thread that issued them goes on (PTX ISA 9.7.9.25, sm_80 and
// up).
#pragma once

#include <cstdint>

namespace fastattn {
namespace ptx {

// 16 bytes, past the first-level cache, to kOffset bytes from `shared`; zeros where `valid` is false, and then the
// source is not read.
template <int kOffset = 0>
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %3], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0), "n"(kOffset)
               : "memory");
}

// 4 bytes, likewise.
template <int kOffset = 0>
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0 + %3], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0),
               "n"(kOffset)
               : "memory");
}

// Closes the group of copies issued since the last one.
__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of the newest groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  static_assert(kPending >= 0, "a number of groups");
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Waits for all copies that this thread issued.
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace ptx
}  // namespace fastattn
