#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

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
  if (dim <= kLargestHeadDim) return Family<kLargestHeadDim>::get(p.dtype, general(p));
  throw std::invalid_argument("head_dim is above " + std::to_string(kLargestHeadDim));
}

int64_t query_blocks(const Params& p, int rows) {
  return tiles(p.seqlen_q, p.batch, varlen(p), rows) * p.heads_q * (varlen(p) ? 1 : p.batch);
}

Arguments arguments_of(const Params& p) {
  constexpr double kLog2E = 1.4426950408889634;
  Arguments a;
  a.p = p;
  a.scale_log2 = static_cast<float>(p.scale * kLog2E);
  a.softcap_log2 = static_cast<float>(p.softcap * kLog2E);
  a.softcap_scale = p.softcap > 0 ? static_cast<float>(p.scale / p.softcap) : 0.0f;
  return a;
}

Plan plan_forward(const Params& p) {
  const Kernel kernel = of_family<sm80::ForwardKernels>(p);
  Plan plan;
  plan.launches.push_back({kernel, query_blocks(p, kernel.rows), arguments_of(p)});
  return plan;
}

}  // namespace

Plan plan(Operation operation, const Params& p, const Gpu& gpu, void* workspace) {
  switch (operation) {
    case Operation::kForward:
      return plan_forward(p);
  }
  throw std::invalid_argument("no such operation");
}

}  // namespace cuda
}  // namespace fastattn
