// Jobs: the pieces of a call that plans hand to kernels, and the memory that they share.
//
// No other job writes to what a job writes to. The order of every sum depends on the problem alone, never on the number
// of threads, which decides at most which rows share a job. So results have the same bits on any number of threads.
#pragma once

#include "../call/params.h"

namespace fastattn {

constexpr int kBlockN = 256;  // keys of a block, the most of one step
constexpr int kMaxPanelsPerJob = 8;
constexpr int kMaxSplits = 32;  // of the keys, for calls with few rows

// Rows [first_row, first_row + rows) of a sequence and key/value head (see tile/panel.h), over the keys [keys.first,
// keys.last).
struct ForwardJob {
  int64_t b, head_kv, first_row, rows;
  KeyRange keys;
  int64_t split;            // which split of the keys; -1: all keys, and the result goes straight to out
  int64_t first_accum_row;  // the place of the first row in a split's results
};

// The results of splits of the keys before they are combined, in the accumulator's dtype.
struct Splits {
  void* out_accum = nullptr;  // (count, rows_total, head_dim_v), normalised
  void* row_max = nullptr;    // (count, rows_total), in the kernel's Unit
  void* row_sum = nullptr;    // (count, rows_total), 0 where a row saw nothing
  int64_t count = 0, rows_total = 0;
};

// Keys [keys.first, keys.last) of a sequence and key/value head, against all its queries.
struct BackwardJob {
  int64_t b, head_kv;
  KeyRange keys;
  int64_t split;        // which addend of dq this job writes
  int64_t first_panel;  // the place of this sequence and head in it
};

// What the jobs of a backward pass share, in the accumulator's dtype.
struct BackwardBuffers {
  void* dq_accum = nullptr;  // (splits, panels, head_dim, panel_rows): addends of dq / scale, one per split of the keys
  View delta;                // (batch, heads_q, seqlen_q): rowsum(dout * out) - dlse
  int64_t splits = 0, panels = 0;
};

// A tile of dbias: one panel of rows and one block of keys of its own shape; all of them where that is 1 (broadcast).
struct DbiasJob {
  int64_t b, h, first_row, first_key;
};

}  // namespace fastattn
