#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../common/grid.h"
#include "../sm75/kernels.h"
#include "../sm80/kernels.h"
#include "../smxx/kernels.h"
#include "num_splits.h"
#include "workspace.h"

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

// The most keys that a tile of `rows` queries can see; how many there are may be known to the device alone.
int64_t keys_of_tile(const Params& p, int rows) {
  const bool open = p.window_left < 0 || p.window_right < 0;
  return open ? p.seqlen_k : std::min(p.seqlen_k, p.window_left + p.window_right + rows);
}

// Attention of few queries: their keys are split over blocks of threads, whose results are merged.
void plan_splits(const Params& p, Arguments a, const Gpu& gpu, Workspace& workspace, Plan& plan) {
  constexpr int kSharedBytes = 96 * 1024;  // of a multiprocessor, at least
  const Kernel decode = of_family<sm80::DecodeKernels>(p);
  const int64_t blocks = packed_tiles(p, decode.rows) * p.heads_kv * p.batch;
  const int64_t slots = int64_t(gpu.multiprocessors) * (kSharedBytes / decode.shared_bytes);
  const int64_t rows = p.batch * p.heads_q * p.seqlen_q;
  a.splits = static_cast<int32_t>(splits(blocks, keys_of_tile(p, decode.rows), slots));
  if (a.splits > 1) {
    a.part_out = workspace.take<float>(a.splits * rows * p.head_dim_v);
    a.part_lse = workspace.take<float>(a.splits * rows);
  }
  plan.launches.push_back({decode, blocks * a.splits, a});
  if (a.splits > 1) plan.launches.push_back({sm80::combine_kernel(p.dtype), rows, a});
}

// Attention of the queries in `a`, by the tiles that serve their number.
void plan_attention(const Params& p, const Arguments& a, const Gpu& gpu, Workspace& workspace, Plan& plan) {
  // The heads that share keys lie in tiles of 16 rows: up to so many queries, no key is read by more of these than of
  // the forward's tiles, of 64 to 128 queries of one head.
  constexpr int64_t kFewQueries = 16;
  if (gpu.capability >= 80 && (p.page_size > 0 || (!varlen(p) && p.seqlen_q <= kFewQueries))) {
    plan_splits(p, a, gpu, workspace, plan);
  } else {
    const Kernel kernel = of_families<sm75::ForwardKernels, sm80::ForwardKernels>(p, gpu);
    plan.launches.push_back({kernel, query_blocks(p, kernel.rows), a});
  }
}

Plan plan_forward(const Params& p, const Gpu& gpu, void* memory) {
  Plan plan;
  Workspace workspace(memory);
  plan_attention(p, arguments_of(p), gpu, workspace, plan);
  plan.workspace_bytes = workspace.bytes();
  return plan;
}

Plan plan_backward(const Params& p, const Gpu& gpu, void* workspace) {
  const int64_t entries = varlen(p) ? 1 : p.batch;
  Workspace memory(workspace);
  Arguments a = arguments_of(p);
  a.row_lse = memory.take<float>(entries * p.heads_q * p.seqlen_q);
  a.minus_delta = memory.take<float>(entries * p.heads_q * p.seqlen_q);
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

// Appends new keys and values, and rotates: what calls with a cache begin with. Returns the arguments for the rest.
Arguments plan_append(const Params& p, Workspace& workspace, Plan& plan) {
  const Kernel append = sm80::append_kernel(p.dtype);
  Arguments a = arguments_of(p);
  int64_t rows = p.batch * p.heads_kv * p.seqlen_new;
  if (p.rotary_dim > 0) {
    const int64_t queries = p.batch * p.heads_q * p.seqlen_q, head = p.seqlen_q * p.head_dim;
    a.rotated = {workspace.take<uint16_t>(queries * p.head_dim), p.heads_q * head, head, p.head_dim, 1};
    rows += queries;
  }
  plan.launches.push_back({append, (rows + append.rows - 1) / append.rows, a});
  if (p.rotary_dim > 0) a.p.q = a.rotated;
  return a;
}

Plan plan_decode(Params p, const Gpu& gpu, void* memory) {
  if (p.page_size % kPageUnit != 0) throw std::invalid_argument("page_size must be a multiple of 16");
  if (p.page_size > 0 && p.num_pages == 0) p.seqlen_k = 0;  // there is no page to look into
  if (p.rotary_positions == 0) p.rotary_dim = 0;
  Plan plan;
  Workspace workspace(memory);
  const Arguments a = plan_append(p, workspace, plan);
  plan_attention(p, a, gpu, workspace, plan);
  plan.workspace_bytes = workspace.bytes();
  return plan;
}

}  // namespace

Plan plan(Operation operation, const Params& p, const Gpu& gpu, void* workspace) {
  switch (operation) {
    case Operation::kForward:
      return plan_forward(p, gpu, workspace);
    case Operation::kBackward:
      return plan_backward(p, gpu, workspace);
    case Operation::kDecode:
      return plan_decode(p, gpu, workspace);
  }
  throw std::invalid_argument("no such operation");
}

}  // namespace cuda
}  // namespace fastattn
