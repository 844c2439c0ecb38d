// Kernels that need no tensor cores: one kernel for any GPU and head dimension.
#pragma once

#include "../host/kernel.h"

namespace fastattn {
namespace cuda {
namespace smxx {

Kernel bwd_preprocess_kernel(DType dtype);
Kernel bwd_dsinks_kernel();

}  // namespace smxx
}  // namespace cuda
}  // namespace fastattn
