// How a launch is cut into tiles; both sides of it must agree.
#pragma once

#include "../params.h"

namespace fastattn {
namespace cuda {

// Tiles that `total` rows of a call may need: an upper bound if the sequences' lengths are known to the device alone.
FASTATTN_HOST_DEVICE inline int64_t tiles(int64_t total, int64_t batch, bool varlen, int rows) {
  return varlen ? total / rows + batch + 1 : (total + rows - 1) / rows;
}

}  // namespace cuda
}  // namespace fastattn
