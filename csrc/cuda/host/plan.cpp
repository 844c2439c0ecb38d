#include "plan.h"

#include <algorithm>
#include <stdexcept>

#include "../common/grid.h"
#include "../smxx/kernels.h"
#include "kernel_table.h"
#include "num_splits.h"
#include "workspace.h"

namespace fastattn {
namespace cuda {
namespace {

bool varlen(const Params& p) { return p.cu_seqlens_q != nullptr; }

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

// Attention of few queries: their keys are split over blocks of threads, whose results are combined.
void plan_splits(const Params& p, Arguments a, const Architecture& architecture, int multiprocessors,
                 Workspace& workspace, Plan& plan) {
  constexpr int kSharedBytes = 96 * 1024;  // of a multiprocessor, at least
  const Kernel decode = architecture.find(Family::kDecode, p);
  const int64_t blocks = packed_tiles(p, decode.block_rows) * p.heads_kv * p.batch;
  const int64_t slots = int64_t(multiprocessors) * (kSharedBytes / decode.shared_bytes);
  const int64_t rows = p.batch * p.heads_q * p.seqlen_q;
  a.splits = static_cast<int32_t>(num_splits(blocks, keys_of_tile(p, decode.block_rows), slots));
  if (a.splits > 1) {
    a.out_accum = workspace.take<float>(a.splits * rows * p.head_dim_v);
    a.lse_accum = workspace.take<float>(a.splits * rows);
  }
  plan.launches.push_back({decode, blocks * a.splits, a});
  if (a.splits > 1) plan.launches.push_back({architecture.find(Family::kCombine, p), rows, a});
}

// Attention of the queries in `a`, by the tiles that serve their number.
void plan_attention(const Params& p, const Arguments& a, const Gpu& gpu, Workspace& workspace, Plan& plan) {
  // The heads that share keys are packed into tiles of 16 rows. Up to so many queries, no key is read by more of these
  // than of the forward's tiles, of 64 to 128 queries of one head.
  constexpr int64_t kFewQueries = 16;
  const Architecture& architecture = architecture_of(gpu.capability);
  const bool few = p.page_size > 0 || (!varlen(p) && p.seqlen_q <= kFewQueries);
  if (few && architecture.has(Family::kDecode)) {
    plan_splits(p, a, architecture, gpu.multiprocessors, workspace, plan);
  } else {
    const Kernel forward = architecture.find(Family::kForward, p);
    plan.launches.push_back({forward, query_blocks(p, forward.block_rows), a});
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
  a.lse_log2 = memory.take<float>(entries * p.heads_q * p.seqlen_q);
  a.neg_delta = memory.take<float>(entries * p.heads_q * p.seqlen_q);
  Plan plan;
  plan.workspace_bytes = memory.bytes();
  const auto launch = [&](const Kernel& kernel, int64_t blocks) { plan.launches.push_back({kernel, blocks, a}); };

  const Kernel preprocess = smxx::bwd_preprocess_kernel(p.dtype);
  launch(preprocess, tiles(p.seqlen_q, 1, false, preprocess.block_rows) * p.heads_q * entries);
  if (p.dsinks.data != nullptr) launch(smxx::bwd_dsinks_kernel(), p.heads_q);
  const Architecture& architecture = architecture_of(gpu.capability);
  if (p.dq.data != nullptr) {
    const Kernel dq = architecture.find(Family::kBwdDq, p);
    launch(dq, query_blocks(p, dq.block_rows));
  }
  const auto launch_over_keys = [&](Family family) {
    const Kernel kernel = architecture.find(family, p);
    launch(kernel, key_blocks(p, kernel.block_rows));
  };
  if (architecture.has(Family::kBwdDkdv, padded_head_dim(p))) {
    if (p.dk.data != nullptr || p.dv.data != nullptr) launch_over_keys(Family::kBwdDkdv);
  } else {
    if (p.dk.data != nullptr) launch_over_keys(Family::kBwdDk);
    if (p.dv.data != nullptr) launch_over_keys(Family::kBwdDv);
  }
  return plan;
}

// Appends new keys and values, and rotates: what calls with a cache begin with. Returns the arguments for the rest.
Arguments plan_append_kv(const Params& p, const Gpu& gpu, Workspace& workspace, Plan& plan) {
  const Kernel append = architecture_of(gpu.capability).find(Family::kAppendKv, p);
  Arguments a = arguments_of(p);
  int64_t rows = p.batch * p.heads_kv * p.seqlen_new;
  if (p.rotary_dim > 0) {
    const int64_t queries = p.batch * p.heads_q * p.seqlen_q, head = p.seqlen_q * p.head_dim;
    a.q_rotated = {workspace.take<uint16_t>(queries * p.head_dim), p.heads_q * head, head, p.head_dim, 1};
    rows += queries;
  }
  plan.launches.push_back({append, (rows + append.block_rows - 1) / append.block_rows, a});
  if (p.rotary_dim > 0) a.p.q = a.q_rotated;
  return a;
}

Plan plan_decode(Params p, const Gpu& gpu, void* memory) {
  if (p.page_size % kPageUnit != 0) throw std::invalid_argument("page_size must be a multiple of 16");
  if (p.page_size > 0 && p.num_pages == 0) p.seqlen_k = 0;  // there is no page to look into
  if (p.rotary_positions == 0) p.rotary_dim = 0;
  Plan plan;
  Workspace workspace(memory);
  const Arguments a = plan_append_kv(p, gpu, workspace, plan);
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
