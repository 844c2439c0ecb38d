// What every kernel is launched with: the call, and the memory that kernels of one call share.
#pragma once

#include "../params.h"

namespace fastattn {
namespace cuda {

struct Arguments {
  Params p;

  // Calls with few queries: each split of the keys writes a result of its own, which `combine` merges.
  int32_t splits = 1;
  int32_t split_keys = 0;        // keys per split, a multiple of kSplitGranularity
  float* partial_out = nullptr;  // (splits, batch, heads_q, seqlen_q, head_dim_v), contiguous
  float* partial_lse = nullptr;  // (splits, batch, heads_q, seqlen_q), contiguous, in units of log2

  // Backward, written by `statistics`: (batch, heads_q, seqlen_q), contiguous.
  float* row_lse = nullptr;  // lse in units of log2; +inf for a row that sees nothing, so that its probabilities are 0
  float* delta = nullptr;    // rowsum(dout * out) - dlse
};

}  // namespace cuda
}  // namespace fastattn
