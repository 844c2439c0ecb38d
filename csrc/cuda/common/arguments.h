// What every kernel is launched with: the call, and numbers that the host derives from it once.
#pragma once

#include "../../call/params.h"

namespace fastattn {
namespace cuda {

struct Arguments {
  Params p;
  float scale_log2 = 0;     // scale * log2(e): a product times this is a score in units of log2
  float softcap_log2 = 0;   // softcap * log2(e); 0 = off
  float softcap_scale = 0;  // scale / softcap

  // Backward pass, written by bwd_preprocess: (batch, heads_q, seqlen_q), with a batch of 1 in varlen calls.
  float* lse_log2 = nullptr;
  float* neg_delta = nullptr;

  // Calls with a cache: in the workspace. `splits` parts of the keys give a result each; a single one is the result.
  int32_t splits = 1;
  View q_rotated;              // like q; null without rotary embedding
  float* out_accum = nullptr;  // (splits, batch, heads_q, seqlen_q, head_dim_v), contiguous
  float* lse_accum = nullptr;  // (splits, batch, heads_q, seqlen_q), contiguous, in units of log2
};

}  // namespace cuda
}  // namespace fastattn
