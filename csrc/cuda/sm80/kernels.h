// The families of kernels for compute capability 8.0 and up. Each head dimension is a translation unit of its own;
// kernels that take any are in one.
#pragma once

#include "../host/kernel.h"

namespace fastattn {
namespace cuda {
namespace sm80 {

// general: with softcap or ALiBi.
template <int kHeadDim>
struct ForwardKernels {
  static Kernel get(DType dtype, bool general);
};

template <int kHeadDim>
struct QueryGradientKernels {
  static Kernel get(DType dtype, bool general);
};

template <int kHeadDim>
struct KeyGradientKernels {
  static KeyGradients get(DType dtype, bool general);
};

template <int kHeadDim>
struct DecodeKernels {
  static Kernel get(DType dtype, bool general);
};

Kernel append_kernel(DType dtype);
Kernel combine_kernel(DType dtype);

}  // namespace sm80
}  // namespace cuda
}  // namespace fastattn
