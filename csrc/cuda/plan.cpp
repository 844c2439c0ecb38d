#include "plan.h"

#include <algorithm>
#include <stdexcept>

#include "sm80/kernels.h"
#include "tiles.h"

namespace fastattn {
namespace cuda {
namespace {

bool varlen(const Params& p) { return p.cu_seqlens_q != nullptr; }
bool general(const Params& p) { return p.softcap > 0 || p.alibi.data != nullptr; }

// The kernel of a family for the call's head dimension, padded.
template <template <int> class Family>
Kernel of_family(const Params& p) {
  const int64_t dim = std::max(p.head_dim, p.head_dim_v);
  if (dim <= 32) return Family<32>::get(p.dtype, general(p));
  if (dim <= 64) return Family<64>::get(p.dtype, general(p));
  if (dim <= 96) return Family<96>::get(p.dtype, general(p));
  if (dim <= 128) return Family<128>::get(p.dtype, general(p));
  if (dim <= 192) return Family<192>::get(p.dtype, general(p));
  if (dim <= 256) return Family<256>::get(p.dtype, general(p));
  throw std::invalid_argument("head_dim is above 256");
}

int64_t query_blocks(const Params& p, int rows) {
  return tiles(p.seqlen_q, p.batch, varlen(p), rows) * p.heads_q * (varlen(p) ? 1 : p.batch);
}

std::vector<Launch> forward(const Params& p, const Device& device) {
  const Kernel kernel = of_family<sm80::ForwardKernels>(p);
  Arguments a;
  a.p = p;
  return {{kernel, query_blocks(p, kernel.rows), a}};
}

}  // namespace

int64_t workspace_bytes(Operation operation, const Params& p, const Device& device) { return 0; }

std::vector<Launch> plan(Operation operation, const Params& p, const Device& device, void* workspace) {
  switch (operation) {
    case Operation::kForward:
      return forward(p, device);
    default:
      throw std::invalid_argument("not yet");
  }
}

}  // namespace cuda
}  // namespace fastattn
