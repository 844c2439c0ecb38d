// How a launch is cut into tiles; both sides of it must agree.
#pragma once

#include "../../call/params.h"

namespace fastattn {
namespace cuda {

constexpr int kPageUnit = 16;  // a page of a cache is a whole number of them

// Tiles that `total` rows of a call may need: an upper bound if the sequences' lengths are known to the device alone.
FASTATTN_HOST_DEVICE inline int64_t tiles(int64_t total, int64_t batch, bool varlen, int rows) {
  return varlen ? total / rows + batch + 1 : (total + rows - 1) / rows;
}

// Tiles of `rows` rows that the queries of one sequence and key/value head need.
FASTATTN_HOST_DEVICE inline int64_t packed_tiles(const Params& p, int rows) {
  return p.heads_kv == 0 ? 0 : (p.seqlen_q * (p.heads_q / p.heads_kv) + rows - 1) / rows;
}

}  // namespace cuda
}  // namespace fastattn
