#include "run.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <stdexcept>

#include "parallel.h"

namespace fastattn {

namespace scalar {
extern const Kernels kKernels;
}
#ifdef FASTATTN_X86
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512bf16 {
extern const Kernels kKernels;
}
#endif

namespace {

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#ifdef FASTATTN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) usable.push_back(&avx512::kKernels);
  // Products of bfloat16 are twice as fast as those of float32 on Zen 4, and half as fast on an Intel Xeon with AMX.
  if (avx512 && __builtin_cpu_supports("avx512bf16"))
    usable.insert(__builtin_cpu_is("intel") ? usable.end() : usable.begin(), &avx512bf16::kKernels);
  if (avx2) usable.push_back(&avx2::kKernels);
#endif
  usable.push_back(&scalar::kKernels);
  return usable;
}

// Below this many multiply-adds per thread, waking a thread costs more than it saves.
constexpr int64_t kWorkPerThread = 250'000;
// As many jobs as keep a large machine busy.
constexpr int64_t kWantedJobs = 64;
// So many that no thread waits long for the last one; fewer, larger ones read and convert K and V less often.
constexpr int64_t kForwardJobsPerThread = 8;
constexpr int64_t kMinKeysPerPart = 512;
// Each part of the keys has an addend of dq of its own: this bounds their memory.
constexpr int64_t kMaxDqParts = 4;

// The union of what the rows of queries [first, last) may see.
KeyRange keys_of_queries(const Params& p, const Sequence& seq, int64_t first, int64_t last) {
  return {visible_keys(p, seq, first).first, visible_keys(p, seq, last - 1).last};
}

struct ForwardPlan {
  std::vector<ForwardJob> jobs;
  std::vector<ForwardJob> rows;  // the same rows without parts, for the merge; empty without parts
  int64_t parts = 0, rows_total = 0, work = 0;
};

ForwardPlan plan_forward(const Params& p, const Kernels& k, int threads) {
  ForwardPlan plan;
  const int64_t panel = k.panel_rows(p.dtype), group = p.heads_kv ? p.heads_q / p.heads_kv : 1;
  int64_t panels = 0, longest = 0;
  for (int64_t b = 0; b < sequences(p); ++b) {
    const Sequence seq = sequence_of(p, b);
    panels += (seq.q_length * group + panel - 1) / panel * p.heads_kv;
    longest = std::max(longest, seq.k_length);
  }
  // No result depends on which panels share a job; but parts are cut from what a job's rows see together.
  int64_t per_job = std::clamp<int64_t>(panels / (threads * kForwardJobsPerThread), 1, kMaxPanelsPerJob);
  if (panels > 0 && panels < kMaxParts) {
    const int64_t parts = std::min((kMaxParts + panels - 1) / panels, longest / kMinKeysPerPart);
    if (parts > 1) {
      plan.parts = parts;
      per_job = 1;
    }
  }
  for (int64_t b = 0; b < sequences(p); ++b) {
    const Sequence seq = sequence_of(p, b);
    const int64_t rows = seq.q_length * group, step = per_job * panel;
    for (int64_t head = 0; head < p.heads_kv; ++head) {
      // Under a causal mask the last rows see most: they go first, so that no long job is left for the end.
      for (int64_t first = (rows - 1) / step * step; rows > 0 && first >= 0; first -= step) {
        ForwardJob job{b, head, first, std::min(step, rows - first), {0, 0}, -1, plan.rows_total};
        KeyRange keys = keys_of_queries(p, seq, first / group, (first + job.rows - 1) / group + 1);
        keys.last = std::max(keys.first, keys.last);
        plan.work += job.rows * (keys.last - keys.first) * (p.head_dim + p.head_dim_v);
        if (plan.parts == 0) {
          job.keys = keys;
          plan.jobs.push_back(job);
          continue;
        }
        plan.rows.push_back(job);
        plan.rows_total += job.rows;
        const int64_t share =
            ((keys.last - keys.first + plan.parts - 1) / plan.parts + kBlockKeys - 1) / kBlockKeys * kBlockKeys;
        for (int64_t part = 0; part < plan.parts; ++part) {
          job.part = part;
          job.keys = {std::min(keys.last, keys.first + part * share),
                      std::min(keys.last, keys.first + (part + 1) * share)};
          plan.jobs.push_back(job);
        }
      }
    }
  }
  return plan;
}

struct BackwardPlan {
  std::vector<BackwardJob> jobs, sums;
  std::vector<BiasJob> bias;
  int64_t parts = 1, panels = 0, work = 0;
};

BackwardPlan plan_backward(const Params& p, const Kernels& k) {
  BackwardPlan plan;
  const int64_t panel = k.panel_rows(p.dtype), group = p.heads_kv ? p.heads_q / p.heads_kv : 1;
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) longest = std::max(longest, sequence_of(p, b).k_length);
  const int64_t pairs = std::max<int64_t>(1, p.batch * p.heads_kv);
  plan.parts = std::clamp<int64_t>(std::min(kWantedJobs / 2 / pairs, longest / kMinKeysPerPart), 1, kMaxDqParts);
  for (int64_t b = 0; b < sequences(p); ++b) {
    const Sequence seq = sequence_of(p, b);
    const int64_t rows = seq.q_length * group;
    const int64_t share = ((seq.k_length + plan.parts - 1) / plan.parts + kBlockKeys - 1) / kBlockKeys * kBlockKeys;
    for (int64_t head = 0; head < p.heads_kv; ++head) {
      BackwardJob job{b, head, {0, 0}, 0, plan.panels};
      plan.sums.push_back(job);
      for (; job.part < plan.parts; ++job.part) {  // under a causal mask the first keys are seen by most: they go first
        job.keys = {std::min(seq.k_length, job.part * share), std::min(seq.k_length, (job.part + 1) * share)};
        plan.jobs.push_back(job);
      }
      plan.panels += (rows + panel - 1) / panel;
      plan.work += rows * seq.k_length * (3 * p.head_dim + 2 * p.head_dim_v);
    }
  }
  if (p.dbias.data == nullptr) return plan;
  const int64_t* size = p.dbias_size;
  for (int64_t b = 0; b < size[0]; ++b)
    for (int64_t h = 0; h < size[1]; ++h)
      for (int64_t row = 0; row < size[2]; row += panel)
        for (int64_t key = 0; key < size[3]; key += kBlockKeys) plan.bias.push_back({b, h, row, key});
  return plan;
}

int useful_threads(int threads, int64_t work) { return int(std::clamp<int64_t>(work / kWorkPerThread, 1, threads)); }

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* k : usable_kernels()) names.push_back(k->name);
  return names;
}

const Kernels& kernels() {
  static const std::vector<const Kernels*> usable = usable_kernels();
  const char* wanted = std::getenv("FASTATTN_CPU_ISA");
  if (wanted == nullptr || *wanted == 0) return *usable.front();
  std::string names;
  for (const Kernels* k : usable) {
    if (std::string(wanted) == k->name) return *k;
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::invalid_argument("FASTATTN_CPU_ISA must name an instruction set of this processor (" + names + "), got " +
                              wanted);
}

void forward_with_cache(const Params& params, int threads) {
  const Kernels& k = kernels();
  Params p = params;
  const size_t element = p.dtype == DType::kFloat64 ? 8 : p.dtype == DType::kFloat32 ? 4 : 2;
  std::vector<char> rotated;
  if (p.rotary_dim > 0) {
    rotated.resize(size_t(p.batch * p.heads_q * p.seqlen_q * p.head_dim) * element);
    const int64_t row = p.head_dim, head = row * p.seqlen_q;
    const View to{rotated.data(), head * p.heads_q, head, row, 1};
    for (int64_t i = 0; i < p.batch * p.heads_q; ++i) k.rotate_queries(p, to, i / p.heads_q, i % p.heads_q);
    p.q = to;
  }
  const int new_threads = useful_threads(threads, p.batch * p.heads_kv * p.seqlen_new * (p.head_dim + p.head_dim_v));
  parallel_for(p.seqlen_new > 0 ? p.batch * p.heads_kv : 0, new_threads,
               [&](int64_t i, int) { k.append(p, i / p.heads_kv, i % p.heads_kv); });
  forward(p, threads);
}

void forward(const Params& p, int threads) {
  const Kernels& k = kernels();
  const ForwardPlan plan = plan_forward(p, k, threads);
  threads = useful_threads(threads, plan.work);
  const size_t each = (k.forward_scratch(p) + 4095) / 4096 * 4096;
  const size_t scalar = p.dtype == DType::kFloat64 ? 8 : 4;
  const size_t out_bytes = size_t(plan.parts * plan.rows_total * p.head_dim_v) * scalar;
  const size_t row_bytes = size_t(plan.parts * plan.rows_total) * scalar;
  const Scratch scratch(each * size_t(threads) + out_bytes + 2 * row_bytes);
  char* memory = scratch.data();
  Parts parts;
  parts.count = plan.parts;
  parts.rows_total = plan.rows_total;
  parts.out = memory + each * size_t(threads);
  parts.row_max = memory + each * size_t(threads) + out_bytes;
  parts.row_sum = memory + each * size_t(threads) + out_bytes + row_bytes;
  parallel_for(int64_t(plan.jobs.size()), threads, [&](int64_t i, int thread) {
    k.forward(p, plan.jobs[size_t(i)], parts, memory + each * size_t(thread));
  });
  parallel_for(int64_t(plan.rows.size()), threads, [&](int64_t i, int) { k.merge(p, plan.rows[size_t(i)], parts); });
}

void backward(const Params& p, int threads) {
  const Kernels& k = kernels();
  const BackwardPlan plan = plan_backward(p, k);
  threads = useful_threads(threads, plan.work);
  const size_t each = (k.backward_scratch(p) + 4095) / 4096 * 4096, scalar = p.dtype == DType::kFloat64 ? 8 : 4;
  const bool varlen = p.cu_seqlens_q != nullptr;
  const size_t deltas = (size_t((varlen ? 1 : p.batch) * p.heads_q * p.seqlen_q) * scalar + 4095) / 4096 * 4096;
  const size_t dq = p.dq.data ? size_t(plan.parts * plan.panels * p.head_dim * k.panel_rows(p.dtype)) * scalar : 0;
  const Scratch scratch(each * size_t(threads) + deltas + dq);
  char* memory = scratch.data();
  BackwardSpace space;
  space.parts = plan.parts;
  space.panels = plan.panels;
  space.delta = {memory + each * size_t(threads), varlen ? 0 : p.heads_q * p.seqlen_q, p.seqlen_q, 1, 0};
  space.dq = memory + each * size_t(threads) + deltas;
  auto sum = [&](const BackwardJob& job) {
    if (p.dq.data != nullptr) k.sum_dq(p, job, space);
  };
  const int64_t group = p.heads_kv ? p.heads_q / p.heads_kv : 1;
  if (plan.parts == 1) {  // a job has its heads to itself: one parallel region instead of three
    parallel_for(int64_t(plan.jobs.size()), threads, [&](int64_t i, int thread) {
      const BackwardJob& job = plan.jobs[size_t(i)];
      for (int64_t h = job.head_kv * group; h < (job.head_kv + 1) * group; ++h) k.delta(p, space, job.b, h);
      k.backward(p, job, space, memory + each * size_t(thread));
      sum(job);
    });
  } else {
    parallel_for(sequences(p) * p.heads_q, threads,
                 [&](int64_t i, int) { k.delta(p, space, i / p.heads_q, i % p.heads_q); });
    parallel_for(int64_t(plan.jobs.size()), threads, [&](int64_t i, int thread) {
      k.backward(p, plan.jobs[size_t(i)], space, memory + each * size_t(thread));
    });
    parallel_for(int64_t(plan.sums.size()), threads, [&](int64_t i, int) { sum(plan.sums[size_t(i)]); });
  }
  parallel_for(int64_t(plan.bias.size()), threads,
               [&](int64_t i, int thread) { k.dbias(p, plan.bias[size_t(i)], space, memory + each * size_t(thread)); });
  if (p.dsinks.data != nullptr) parallel_for(p.heads_q, threads, [&](int64_t head, int) { k.dsinks(p, space, head); });
}

int64_t multiply_adds(DType dtype, int64_t steps, int threads) {
  const Kernels& k = kernels();
  std::vector<int64_t> done(size_t(threads), 0);
  parallel_for(threads, threads, [&](int64_t i, int) { done[size_t(i)] = k.multiply_adds(dtype, steps); });
  return std::accumulate(done.begin(), done.end(), int64_t(0));
}

}  // namespace fastattn
