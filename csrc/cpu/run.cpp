#include "run.h"

#include <numeric>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"
#include "plan.h"
#include "workspace.h"

namespace fastattn {
namespace {

size_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
size_t accumulator_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }
size_t whole_pages(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

// Turns the queries by the angles of their positions; p.q becomes the copy in `memory`.
void rotate_queries(const Kernels& k, Params& p, std::vector<char>& memory) {
  memory.resize(size_t(p.batch * p.heads_q * p.seqlen_q * p.head_dim) * element_size(p.dtype));
  const int64_t row = p.head_dim, head = row * p.seqlen_q;
  const View to{memory.data(), head * p.heads_q, head, row, 1};
  for (int64_t i = 0; i < p.batch * p.heads_q; ++i) k.rotate_queries(p, to, i / p.heads_q, i % p.heads_q);
  p.q = to;
}

void run_backward_jobs(const Kernels& k, const Params& p, const BackwardPlan& plan, const BackwardBuffers& buffers,
                       char* memory, size_t scratch_bytes, int threads) {
  auto sum_dq = [&](const BackwardJob& job) {
    if (p.dq.data != nullptr) k.sum_dq(p, job, buffers);
  };
  if (plan.splits == 1) {  // a job has its heads to itself: one parallel region instead of three
    const int64_t group = p.heads_kv ? p.heads_q / p.heads_kv : 1;
    parallel_for(int64_t(plan.jobs.size()), threads, [&](int64_t i, int thread) {
      const BackwardJob& job = plan.jobs[size_t(i)];
      for (int64_t h = job.head_kv * group; h < (job.head_kv + 1) * group; ++h) k.bwd_preprocess(p, buffers, job.b, h);
      k.backward(p, job, buffers, memory + scratch_bytes * size_t(thread));
      sum_dq(job);
    });
    return;
  }
  parallel_for(sequences(p) * p.heads_q, threads,
               [&](int64_t i, int) { k.bwd_preprocess(p, buffers, i / p.heads_q, i % p.heads_q); });
  parallel_for(int64_t(plan.jobs.size()), threads, [&](int64_t i, int thread) {
    k.backward(p, plan.jobs[size_t(i)], buffers, memory + scratch_bytes * size_t(thread));
  });
  parallel_for(int64_t(plan.sum_dq.size()), threads, [&](int64_t i, int) { sum_dq(plan.sum_dq[size_t(i)]); });
}

}  // namespace

void forward_with_cache(const Params& params, int threads) {
  const Kernels& k = kernels();
  Params p = params;
  std::vector<char> rotated;
  if (p.rotary_dim > 0) rotate_queries(k, p, rotated);
  const int64_t heads = p.batch * p.heads_kv, work = heads * p.seqlen_new * (p.head_dim + p.head_dim_v);
  parallel_for(p.seqlen_new > 0 ? heads : 0, useful_threads(threads, work),
               [&](int64_t i, int) { k.append_kv(p, i / p.heads_kv, i % p.heads_kv); });
  forward(p, threads);
}

void forward(const Params& p, int threads) {
  const Kernels& k = kernels();
  const ForwardPlan plan = plan_forward(p, k.panel_rows(p.dtype), threads);
  threads = useful_threads(threads, plan.work);
  const size_t scratch_bytes = whole_pages(k.forward_scratch(p)), scalar = accumulator_size(p.dtype);
  const size_t out_bytes = size_t(plan.splits * plan.rows_total * p.head_dim_v) * scalar;
  const size_t row_bytes = size_t(plan.splits * plan.rows_total) * scalar;
  const Workspace workspace(scratch_bytes * size_t(threads) + out_bytes + 2 * row_bytes);
  char* const memory = workspace.data();
  char* const accum = memory + scratch_bytes * size_t(threads);
  const Splits splits{accum, accum + out_bytes, accum + out_bytes + row_bytes, plan.splits, plan.rows_total};
  parallel_for(int64_t(plan.jobs.size()), threads, [&](int64_t i, int thread) {
    k.forward(p, plan.jobs[size_t(i)], splits, memory + scratch_bytes * size_t(thread));
  });
  parallel_for(int64_t(plan.combine.size()), threads,
               [&](int64_t i, int) { k.combine(p, plan.combine[size_t(i)], splits); });
}

void backward(const Params& p, int threads) {
  const Kernels& k = kernels();
  const int64_t panel_rows = k.panel_rows(p.dtype);
  const BackwardPlan plan = plan_backward(p, panel_rows);
  threads = useful_threads(threads, plan.work);
  const size_t scratch_bytes = whole_pages(k.backward_scratch(p)), scalar = accumulator_size(p.dtype);
  const bool varlen = p.cu_seqlens_q != nullptr;
  const size_t delta_bytes = whole_pages(size_t((varlen ? 1 : p.batch) * p.heads_q * p.seqlen_q) * scalar);
  const size_t dq_bytes = p.dq.data ? size_t(plan.splits * plan.panels * p.head_dim * panel_rows) * scalar : 0;
  const Workspace workspace(scratch_bytes * size_t(threads) + delta_bytes + dq_bytes);
  char* const memory = workspace.data();
  char* const delta = memory + scratch_bytes * size_t(threads);
  const View delta_view{delta, varlen ? 0 : p.heads_q * p.seqlen_q, p.seqlen_q, 1, 0};
  const BackwardBuffers buffers{delta + delta_bytes, delta_view, plan.splits, plan.panels};
  run_backward_jobs(k, p, plan, buffers, memory, scratch_bytes, threads);
  parallel_for(int64_t(plan.dbias.size()), threads, [&](int64_t i, int thread) {
    k.bwd_dbias(p, plan.dbias[size_t(i)], buffers, memory + scratch_bytes * size_t(thread));
  });
  if (p.dsinks.data != nullptr)
    parallel_for(p.heads_q, threads, [&](int64_t head, int) { k.bwd_dsinks(p, buffers, head); });
}

int64_t multiply_adds(DType dtype, int64_t steps, int threads) {
  const Kernels& k = kernels();
  std::vector<int64_t> done(size_t(threads), 0);
  parallel_for(threads, threads, [&](int64_t i, int) { done[size_t(i)] = k.multiply_adds(dtype, steps); });
  return std::accumulate(done.begin(), done.end(), int64_t(0));
}

}  // namespace fastattn
