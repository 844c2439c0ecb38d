// From a call to launches, as data: pure functions of the call.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace fastattn {
namespace cuda {

struct Launch {
  Kernel kernel;
  int64_t blocks;
  Arguments arguments;
};

constexpr int kLargestHeadDim = 256;

// The forward pass of a dense or varlen call, on GPUs of compute capability 8.0 and up.
Launch plan_forward(const Params& p);

}  // namespace cuda
}  // namespace fastattn
