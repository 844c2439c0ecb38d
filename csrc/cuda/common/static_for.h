// Loops whose index is a constant in their body: it can be part of an address or a template argument.
#pragma once

#include <utility>

namespace fastattn {
namespace cuda {

// A number that is its type: std::integral_constant, for host and device.
template <int kValue>
struct Constant {
  __host__ __device__ constexpr operator int() const { return kValue; }
};

template <class Body, int... kIndices>
__device__ __forceinline__ void static_for(Body&& body, std::integer_sequence<int, kIndices...>) {
  (body(Constant<kIndices>()), ...);
}

// body(0), body(1) ... body(kCount - 1), each with a Constant.
template <int kCount, class Body>
__device__ __forceinline__ void static_for(Body&& body) {
  static_for(body, std::make_integer_sequence<int, kCount>());
}

}  // namespace cuda
}  // namespace fastattn
