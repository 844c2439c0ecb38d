// From a call to launches, as data: pure functions of the call and of what they need to know of the GPU.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel.h"

namespace fastattn {
namespace cuda {

struct Device {
  int capability = 0;  // 10 * major + minor
  int multiprocessors = 0;
};

struct Launch {
  Kernel kernel;
  int64_t blocks;
  Arguments arguments;
};

enum class Operation { kForward, kBackward, kWithCache };

// Head dimensions that kernels are compiled for; smaller ones are padded with zeros on the way into shared memory.
constexpr int kHeadDims[] = {32, 64, 96, 128, 192, 256};

// Bytes of memory that the launches of a call share. It need not be initialised; 16-byte alignment is enough.
int64_t workspace_bytes(Operation operation, const Params& p, const Device& device);

// The launches, in order. `workspace` has at least workspace_bytes.
std::vector<Launch> plan(Operation operation, const Params& p, const Device& device, void* workspace);

}  // namespace cuda
}  // namespace fastattn
