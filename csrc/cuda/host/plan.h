// From a call to launches, as data: pure functions of the call.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel.h"

namespace fastattn {
namespace cuda {

struct Launch {
  Kernel kernel;
  int64_t blocks;
  Arguments arguments;
};

// Launches, one behind the other, and the memory that they hand numbers on in.
struct Plan {
  std::vector<Launch> launches;
  int64_t workspace_bytes = 0;
};

// What a plan depends on besides the call.
struct Gpu {
  int capability;  // times 10
  int multiprocessors;
};

enum class Operation { kForward, kBackward, kDecode };

constexpr int kLargestHeadDim = 256;
constexpr int kLargestHeadDim75 = 128;  // of compute capability 7.5

// The plan of an operation, with workspace_bytes of memory from `workspace` on, which begins at a multiple of 256
// bytes. How much is needed does not depend on where it lies.
Plan plan(Operation operation, const Params& p, const Gpu& gpu, void* workspace);

}  // namespace cuda
}  // namespace fastattn
