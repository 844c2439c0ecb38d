// What each instruction set provides: a table of plain functions, and the work they are handed.
//
// A job is a piece of a call that no other job writes to. Whatever is summed is summed in an order that depends on the
// problem alone, never on the number of threads, which decides at most what shares a job. So results are the same bit
// for bit on any number of threads.
#pragma once

#include <cstddef>

#include "../../call/params.h"

namespace fastattn {

// Rows [first_row, first_row + rows) of a sequence and key/value head (see rows.h), over the keys [keys.first,
// keys.last).
struct ForwardJob {
  int64_t b, head_kv, first_row, rows;
  KeyRange keys;
  int64_t part;            // which part of the keys; -1: all of them, and the result goes straight to out
  int64_t first_part_row;  // where the first row's results lie in a part
};

// Where the results over parts of the keys wait to be merged, in the accumulator's dtype:
// out (parts, rows_total, head_dim_v), normalised; row_max (parts, rows_total), in the kernel's Unit, and row_sum
// likewise, 0 where nothing was seen.
struct Parts {
  void* out = nullptr;
  void* row_max = nullptr;
  void* row_sum = nullptr;
  int64_t count = 0, rows_total = 0;
};

// Keys [keys.first, keys.last) of a sequence and key/value head, against all its queries.
struct BackwardJob {
  int64_t b, head_kv;
  KeyRange keys;
  int64_t part;         // which part of dq's sum this job writes, and
  int64_t first_panel;  // where the panels of this sequence and head begin in it
};

// Memory of a backward pass, in the accumulator's dtype.
struct BackwardSpace {
  void* dq = nullptr;  // (parts, panels, head_dim, panel_rows): addends of dq / scale, one per part of the keys
  View delta;          // (batch, heads_q, seqlen_q): rowsum(dout * out) - dlse
  int64_t parts = 0, panels = 0;
};

// A tile of dbias: one panel of rows and one block of keys of its own shape; all of them where that is 1 (broadcast).
struct BiasJob {
  int64_t b, h, first_row, first_key;
};

struct Kernels {
  const char* name;
  void (*append)(const Params&, int64_t b, int64_t head_kv);  // new keys and values into the cache
  void (*rotate_queries)(const Params&, const View& to, int64_t b, int64_t head);
  int (*panel_rows)(DType);
  size_t (*forward_scratch)(const Params&);  // bytes of scratch memory that a thread needs
  void (*forward)(const Params&, const ForwardJob&, const Parts&, void* scratch);
  void (*merge)(const Params&, const ForwardJob&, const Parts&);
  size_t (*backward_scratch)(const Params&);
  void (*delta)(const Params&, const BackwardSpace&, int64_t b, int64_t head);
  void (*backward)(const Params&, const BackwardJob&, const BackwardSpace&, void* scratch);
  void (*sum_dq)(const Params&, const BackwardJob&, const BackwardSpace&);
  void (*dbias)(const Params&, const BiasJob&, const BackwardSpace&, void* scratch);
  void (*dsinks)(const Params&, const BackwardSpace&, int64_t head);
  int64_t (*multiply_adds)(DType, int64_t steps);  // see peak.h
};

constexpr int kBlockKeys = 256;  // keys of a block, the most of one step
constexpr int kMaxParts = 32;    // of a call's keys, for calls with few rows
constexpr int kMaxPanelsPerJob = 8;

}  // namespace fastattn
