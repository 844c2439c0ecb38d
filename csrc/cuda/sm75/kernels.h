// The kernels for compute capability 7.5, which multiplies float16 alone. <family>.cu defines those of a family, once
// per head dimension.
#pragma once

#include "../host/kernel.h"

namespace fastattn {
namespace cuda {
namespace sm75 {

template <Family kFamily, int kHeadDim>
Kernel kernel(DType dtype, bool has_score_mod);

}  // namespace sm75
}  // namespace cuda
}  // namespace fastattn
