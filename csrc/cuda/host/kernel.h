// A compiled kernel, as the host launches it. Every kernel takes Arguments by value, and a grid of one dimension.
#pragma once

#include "../common/arguments.h"

namespace fastattn {
namespace cuda {

struct Kernel {
  const char* name;  // as profilers show it
  const void* function;
  int threads;       // per block
  int shared_bytes;  // dynamic, per block
  int block_rows;    // queries or keys that a block owns
};

// What a kernel computes. A family has a kernel for each head dimension (or one for all), dtype, and calls with and
// without score_mod. An architecture has bwd_dkdv, or bwd_dk and bwd_dv, for a head dimension.
enum class Family { kForward, kDecode, kCombine, kAppendKv, kBwdDq, kBwdDkdv, kBwdDk, kBwdDv };

}  // namespace cuda
}  // namespace fastattn
