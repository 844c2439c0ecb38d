// From a call to launches, as data: pure functions of the call.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel.h"

namespace fastattn {
namespace cuda {

// A tensor as the copy engine of later GPUs reads it: a CUtensorMap.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

struct Launch {
  Kernel kernel;
  int64_t blocks;
  Arguments arguments;
  int cluster_size = 1;                // blocks that share their shared memory
  std::vector<TensorMap> tensor_maps;  // what the kernel takes after its Arguments, by value
};

// Launches, in their order, and the memory through which they pass numbers on.
struct Plan {
  std::vector<Launch> launches;
  int64_t workspace_bytes = 0;
};

// What a plan also depends on.
struct Gpu {
  int capability;  // times 10
  int multiprocessors;
};

enum class Operation { kForward, kBackward, kDecode };

// The plan of an operation, with workspace_bytes of memory from `workspace` on, which begins at a multiple of 256
// bytes. How much is needed does not depend on where it is.
Plan plan(Operation operation, const Params& p, const Gpu& gpu, void* workspace);

}  // namespace cuda
}  // namespace fastattn
