// What every kernel is launched with: the call, and numbers that the host derives from it once.
#pragma once

#include "../params.h"

namespace fastattn {
namespace cuda {

struct Arguments {
  Params p;
  float scale_log2 = 0;     // scale * log2(e): a product times this is a score in units of log2
  float softcap_log2 = 0;   // softcap * log2(e); 0 = off
  float softcap_scale = 0;  // scale / softcap

  // Backward: numbers of each row, (batch or 1 for varlen, heads_q, seqlen_q), see row_statistics.h.
  float* row_lse = nullptr;
  float* minus_delta = nullptr;
};

}  // namespace cuda
}  // namespace fastattn
