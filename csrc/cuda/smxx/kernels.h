// The kernels of bwd_preprocess.cu.
#pragma once

#include "../host/kernel.h"

namespace fastattn {
namespace cuda {

Kernel row_statistics_kernel(DType dtype);
Kernel sink_gradient_kernel();

}  // namespace cuda
}  // namespace fastattn
