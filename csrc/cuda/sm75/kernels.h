// The families of kernels for compute capability 7.5, float16 alone. Each head dimension is a translation unit of its
// own.
#pragma once

#include "../host/kernel.h"

namespace fastattn {
namespace cuda {
namespace sm75 {

// general: with softcap or ALiBi.
template <int kHeadDim>
struct ForwardKernels {
  static Kernel get(bool general);
};

template <int kHeadDim>
struct QueryGradientKernels {
  static Kernel get(bool general);
};

template <int kHeadDim>
struct KeyGradientKernels {
  static KeyGradients get(bool general);
};

}  // namespace sm75
}  // namespace cuda
}  // namespace fastattn
