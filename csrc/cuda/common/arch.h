// Whether code is for compute capability 9.0 and up. ptxas fits fewer of the same kernels into 255 registers there, so
// some keep fragments in shared memory, and those that copy keys and values read strides there.
#pragma once

namespace fastattn {
namespace cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kFrom90 = true;
#else
constexpr bool kFrom90 = false;
#endif

}  // namespace cuda
}  // namespace fastattn
