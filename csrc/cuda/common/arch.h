// Traits of the architecture that device code is compiled for. Kernels ask these, and compare no version numbers.
#pragma once

namespace fastattn {
namespace cuda {

// kSm: compute capability, times 10.
template <int kSm>
struct ArchTraits {
  // From 9.0 on ptxas fits fewer of the same kernels into 255 registers. There some operands stay partly in shared
  // memory, and copies read their strides again instead of keeping them.
  static constexpr bool kShortOfRegisters = kSm >= 90;
};

// In host code no trait holds: what a launch needs to know must not depend on one.
#ifdef __CUDA_ARCH__
using Arch = ArchTraits<__CUDA_ARCH__ / 10>;
#else
using Arch = ArchTraits<0>;
#endif

}  // namespace cuda
}  // namespace fastattn
