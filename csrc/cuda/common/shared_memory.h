// Addresses in shared memory.
#pragma once

#include <cstdint>

namespace fastattn {
namespace cuda {

// As ptx/ takes it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The shared memory that a launch asks for.
__device__ __forceinline__ char* dynamic_shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

}  // namespace cuda
}  // namespace fastattn
