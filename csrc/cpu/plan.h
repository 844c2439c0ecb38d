// Plans: how a call is cut into jobs. Pure functions of the call, the rows of a panel and the number of threads.
#pragma once

#include <vector>

#include "jobs.h"

namespace fastattn {

// work counts multiply-adds.
struct ForwardPlan {
  std::vector<ForwardJob> jobs;
  std::vector<ForwardJob> combine;  // the same rows over all keys; empty without splits
  int64_t splits = 0, rows_total = 0, work = 0;
};

struct BackwardPlan {
  std::vector<BackwardJob> jobs;
  std::vector<BackwardJob> sum_dq;  // one per sequence and key/value head
  std::vector<DbiasJob> dbias;
  int64_t splits = 1, panels = 0, work = 0;
};

ForwardPlan plan_forward(const Params& p, int64_t panel_rows, int threads);
BackwardPlan plan_backward(const Params& p, int64_t panel_rows);

// How many of `threads` threads are worth waking for so much work.
int useful_threads(int threads, int64_t work);

}  // namespace fastattn
