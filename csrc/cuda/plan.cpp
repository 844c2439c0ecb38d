#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "rows.h"
#include "sm75/kernels.h"
#include "sm80/kernels.h"
#include "tiles.h"

namespace fastattn {
namespace cuda {
namespace {

bool varlen(const Params& p) { return p.cu_seqlens_q != nullptr; }
bool general(const Params& p) { return p.softcap > 0 || p.alibi.data != nullptr; }

// The kernel of a family for the call's head dimension, padded.
template <template <int> class Family>
auto of_family(const Params& p) {
  const int64_t dim = std::max(p.head_dim, p.head_dim_v);
  if (dim <= 32) return Family<32>::get(p.dtype, general(p));
  if (dim <= 64) return Family<64>::get(p.dtype, general(p));
  if (dim <= 96) return Family<96>::get(p.dtype, general(p));
  if (dim <= 128) return Family<128>::get(p.dtype, general(p));
  if (dim <= 192) return Family<192>::get(p.dtype, general(p));
  if (dim <= kLargestHeadDim) return Family<kLargestHeadDim>::get(p.dtype, general(p));
  throw std::invalid_argument("head_dim is above " + std::to_string(kLargestHeadDim));
}

// The same for compute capability 7.5.
template <template <int> class Family>
auto of_family_75(const Params& p) {
  if (p.dtype != DType::kFloat16) throw std::invalid_argument("compute capability 7.5 multiplies float16 alone");
  const int64_t dim = std::max(p.head_dim, p.head_dim_v);
  if (dim <= 64) return Family<64>::get(general(p));
  if (dim <= kLargestHeadDim75) return Family<kLargestHeadDim75>::get(general(p));
  throw std::invalid_argument("head_dim is above " + std::to_string(kLargestHeadDim75));
}

// The kernel for a GPU.
template <template <int> class Family75, template <int> class Family80>
auto of_families(const Params& p, const Gpu& gpu) {
  return gpu.capability < 80 ? of_family_75<Family75>(p) : of_family<Family80>(p);
}

int64_t query_blocks(const Params& p, int rows) {
  return tiles(p.seqlen_q, p.batch, varlen(p), rows) * p.heads_q * (varlen(p) ? 1 : p.batch);
}

int64_t key_blocks(const Params& p, int rows) {
  return tiles(p.seqlen_k, p.batch, varlen(p), rows) * p.heads_kv * (varlen(p) ? 1 : p.batch);
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

Plan plan_forward(const Params& p, const Gpu& gpu) {
  const Kernel kernel = of_families<sm75::ForwardKernels, sm80::ForwardKernels>(p, gpu);
  Plan plan;
  plan.launches.push_back({kernel, query_blocks(p, kernel.rows), arguments_of(p)});
  return plan;
}

// Parts of a workspace, one behind the other.
class Workspace {
 public:
  explicit Workspace(void* begin) : begin_(static_cast<char*>(begin)) {}

  // Room for a number of floats; null where there is no workspace yet.
  float* floats(int64_t count) {
    constexpr int64_t kAlignment = 256;
    char* part = begin_ == nullptr ? nullptr : begin_ + bytes_;
    bytes_ += (count * 4 + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<float*>(part);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* begin_;
  int64_t bytes_ = 0;
};

Plan plan_backward(const Params& p, const Gpu& gpu, void* workspace) {
  const int64_t entries = varlen(p) ? 1 : p.batch;
  Workspace memory(workspace);
  Arguments a = arguments_of(p);
  a.row_lse = memory.floats(entries * p.heads_q * p.seqlen_q);
  a.minus_delta = memory.floats(entries * p.heads_q * p.seqlen_q);
  Plan plan;
  plan.workspace_bytes = memory.bytes();
  const auto launch = [&](const Kernel& kernel, int64_t blocks) { plan.launches.push_back({kernel, blocks, a}); };

  const Kernel statistics = row_statistics_kernel(p.dtype);
  launch(statistics, tiles(p.seqlen_q, 1, false, statistics.rows) * p.heads_q * entries);
  if (p.dsinks.data != nullptr) launch(sink_gradient_kernel(), p.heads_q);
  if (p.dq.data != nullptr) {
    const Kernel kernel = of_families<sm75::QueryGradientKernels, sm80::QueryGradientKernels>(p, gpu);
    launch(kernel, query_blocks(p, kernel.rows));
  }
  const KeyGradients kernels = of_families<sm75::KeyGradientKernels, sm80::KeyGradientKernels>(p, gpu);
  const bool together = kernels.keys.function == kernels.values.function;
  if (p.dk.data != nullptr || (together && p.dv.data != nullptr))
    launch(kernels.keys, key_blocks(p, kernels.keys.rows));
  if (p.dv.data != nullptr && !together) launch(kernels.values, key_blocks(p, kernels.values.rows));
  return plan;
}

}  // namespace

Plan plan(Operation operation, const Params& p, const Gpu& gpu, void* workspace) {
  switch (operation) {
    case Operation::kForward:
      return plan_forward(p, gpu);
    case Operation::kBackward:
      return plan_backward(p, gpu, workspace);
  }
  throw std::invalid_argument("no such operation");
}

}  // namespace cuda
}  // namespace fastattn
