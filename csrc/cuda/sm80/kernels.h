// The kernels for compute capability 8.0 and up. <family>.cu defines those of a family, once per head dimension.
#pragma once

#include "../host/kernel.h"

namespace fastattn {
namespace cuda {
namespace sm80 {

template <Family kFamily, int kHeadDim>
Kernel kernel(DType dtype, bool has_score_mod);

// For any head dimension; score_mod makes no difference to them.
Kernel append_kv_kernel(DType dtype, bool has_score_mod);
Kernel combine_kernel(DType dtype, bool has_score_mod);

}  // namespace sm80
}  // namespace cuda
}  // namespace fastattn
