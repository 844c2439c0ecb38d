// What each instruction set provides: a table of plain functions.
#pragma once

#include <cstddef>

#include "../jobs.h"

namespace fastattn {

struct Kernels {
  const char* name;
  int (*panel_rows)(DType);

  // Writes new keys and values into the cache.
  void (*append_kv)(const Params&, int64_t b, int64_t head_kv);
  void (*rotate_queries)(const Params&, const View& to, int64_t b, int64_t head);

  size_t (*forward_scratch)(const Params&);  // bytes of scratch memory that a thread needs
  void (*forward)(const Params&, const ForwardJob&, const Splits&, void* scratch);
  void (*combine)(const Params&, const ForwardJob&, const Splits&);

  size_t (*backward_scratch)(const Params&);  // of backward and bwd_dbias, likewise
  void (*bwd_preprocess)(const Params&, const BackwardBuffers&, int64_t b, int64_t head);
  void (*backward)(const Params&, const BackwardJob&, const BackwardBuffers&, void* scratch);
  void (*sum_dq)(const Params&, const BackwardJob&, const BackwardBuffers&);
  void (*bwd_dbias)(const Params&, const DbiasJob&, const BackwardBuffers&, void* scratch);
  void (*bwd_dsinks)(const Params&, const BackwardBuffers&, int64_t head);

  int64_t (*multiply_adds)(DType, int64_t steps);  // see peak.h
};

}  // namespace fastattn
