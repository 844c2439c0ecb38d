#include "plan.h"

#include <algorithm>

namespace fastattn {
namespace {

// Below this many multiply-adds per thread, waking a thread costs more than it saves.
constexpr int64_t kWorkPerThread = 250'000;
// As many jobs as keep a large machine busy.
constexpr int64_t kWantedJobs = 64;
// With so many, no thread waits long for the last one. Fewer and larger jobs read and convert K and V less often.
constexpr int64_t kForwardJobsPerThread = 8;
constexpr int64_t kMinKeysPerSplit = 512;
// Each split of the keys has its own addend of dq: this bounds their memory.
constexpr int64_t kMaxDqSplits = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Query heads that share a key/value head.
int64_t group_size(const Params& p) { return p.heads_kv ? p.heads_q / p.heads_kv : 1; }

// The union of what the rows of queries [first, last) may see.
KeyRange keys_of_queries(const Params& p, const Sequence& seq, int64_t first, int64_t last) {
  KeyRange keys{visible_keys(p, seq, first).first, visible_keys(p, seq, last - 1).last};
  keys.last = std::max(keys.first, keys.last);
  return keys;
}

// One of `splits` shares of keys, in whole blocks.
KeyRange split_of(KeyRange keys, int64_t split, int64_t splits) {
  const int64_t share = ceil_div(ceil_div(keys.last - keys.first, splits), kBlockN) * kBlockN;
  return {std::min(keys.last, keys.first + split * share), std::min(keys.last, keys.first + (split + 1) * share)};
}

struct Extent {
  int64_t panels = 0, longest = 0;  // of all sequences and key/value heads; most keys of a sequence
};

Extent extent_of(const Params& p, int64_t panel_rows) {
  Extent extent;
  for (int64_t b = 0; b < sequences(p); ++b) {
    const Sequence seq = sequence_of(p, b);
    extent.panels += ceil_div(seq.q_length * group_size(p), panel_rows) * p.heads_kv;
    extent.longest = std::max(extent.longest, seq.k_length);
  }
  return extent;
}

// Splits of the keys that give a call with few panels enough jobs; 0: none.
int64_t forward_splits(const Extent& extent) {
  if (extent.panels == 0 || extent.panels >= kMaxSplits) return 0;
  const int64_t splits = std::min(ceil_div(kMaxSplits, extent.panels), extent.longest / kMinKeysPerSplit);
  return splits > 1 ? splits : 0;
}

int64_t backward_splits(const Params& p, const Extent& extent) {
  const int64_t pairs = std::max<int64_t>(1, p.batch * p.heads_kv);
  return std::clamp<int64_t>(std::min(kWantedJobs / 2 / pairs, extent.longest / kMinKeysPerSplit), 1, kMaxDqSplits);
}

void add_forward_job(const Params& p, ForwardPlan& plan, ForwardJob job) {
  plan.work += job.rows * (job.keys.last - job.keys.first) * (p.head_dim + p.head_dim_v);
  if (plan.splits == 0) {
    plan.jobs.push_back(job);
    return;
  }
  plan.combine.push_back(job);
  plan.rows_total += job.rows;
  const KeyRange keys = job.keys;
  for (job.split = 0; job.split < plan.splits; ++job.split) {
    job.keys = split_of(keys, job.split, plan.splits);
    plan.jobs.push_back(job);
  }
}

}  // namespace

ForwardPlan plan_forward(const Params& p, int64_t panel_rows, int threads) {
  ForwardPlan plan;
  const int64_t group = group_size(p);
  const Extent extent = extent_of(p, panel_rows);
  plan.splits = forward_splits(extent);
  // No result depends on which panels share a job. But splits are cut from what the rows of a job see together: their
  // jobs have one panel.
  const int64_t wanted = std::clamp<int64_t>(extent.panels / (threads * kForwardJobsPerThread), 1, kMaxPanelsPerJob);
  const int64_t step = (plan.splits > 0 ? 1 : wanted) * panel_rows;
  for (int64_t b = 0; b < sequences(p); ++b) {
    const Sequence seq = sequence_of(p, b);
    const int64_t rows = seq.q_length * group;
    for (int64_t head = 0; head < p.heads_kv; ++head) {
      // Under a causal mask the last rows see most: they go first, so that no long job is left for the end.
      for (int64_t first = (rows - 1) / step * step; rows > 0 && first >= 0; first -= step) {
        const int64_t count = std::min(step, rows - first), last_query = (first + count - 1) / group;
        const KeyRange keys = keys_of_queries(p, seq, first / group, last_query + 1);
        add_forward_job(p, plan, {b, head, first, count, keys, -1, plan.rows_total});
      }
    }
  }
  return plan;
}

BackwardPlan plan_backward(const Params& p, int64_t panel_rows) {
  BackwardPlan plan;
  plan.splits = backward_splits(p, extent_of(p, panel_rows));
  for (int64_t b = 0; b < sequences(p); ++b) {
    const Sequence seq = sequence_of(p, b);
    const int64_t rows = seq.q_length * group_size(p);
    for (int64_t head = 0; head < p.heads_kv; ++head) {
      BackwardJob job{b, head, {0, 0}, 0, plan.panels};
      plan.sum_dq.push_back(job);
      // Under a causal mask most rows see the first keys: they go first.
      for (; job.split < plan.splits; ++job.split) {
        job.keys = split_of({0, seq.k_length}, job.split, plan.splits);
        plan.jobs.push_back(job);
      }
      plan.panels += ceil_div(rows, panel_rows);
      plan.work += rows * seq.k_length * (3 * p.head_dim + 2 * p.head_dim_v);
    }
  }
  if (p.dbias.data == nullptr) return plan;
  const int64_t* size = p.dbias_size;
  for (int64_t b = 0; b < size[0]; ++b)
    for (int64_t h = 0; h < size[1]; ++h)
      for (int64_t row = 0; row < size[2]; row += panel_rows)
        for (int64_t key = 0; key < size[3]; key += kBlockN) plan.dbias.push_back({b, h, row, key});
  return plan;
}

int useful_threads(int threads, int64_t work) { return int(std::clamp<int64_t>(work / kWorkPerThread, 1, threads)); }

}  // namespace fastattn
