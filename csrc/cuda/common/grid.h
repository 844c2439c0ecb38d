// How a launch is cut into tiles; host and device must agree.
#pragma once

#include "../../call/params.h"

namespace fastattn {
namespace cuda {

constexpr int kPageUnit = 16;  // keys; a page of a cache is a whole number of units

// Tiles that `total` rows of a call may need. An upper bound if only the device knows the lengths of the sequences.
FASTATTN_HOST_DEVICE inline int64_t tiles(int64_t total, int64_t batch, bool varlen, int rows) {
  return varlen ? total / rows + batch + 1 : (total + rows - 1) / rows;
}

// Tiles of `rows` rows that the queries of one sequence and key/value head need.
FASTATTN_HOST_DEVICE inline int64_t packed_tiles(const Params& p, int rows) {
  return p.heads_kv == 0 ? 0 : (p.seqlen_q * (p.heads_q / p.heads_kv) + rows - 1) / rows;
}

}  // namespace cuda
}  // namespace fastattn
