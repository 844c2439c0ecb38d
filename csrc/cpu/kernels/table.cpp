// Compiled once per instruction set, with FASTATTN_ISA as its name and FASTATTN_SIMD as its vector types. Instantiates
// nothing of the C++ library: the linker could pick that copy, with this file's instructions, for all callers.
#include "table.h"

#include "append_kv.h"
#include "backward.h"
#include "bwd_dbias.h"
#include "bwd_dsinks.h"
#include "bwd_preprocess.h"
#include "combine.h"
#include "decode.h"
#include "forward.h"
#include "peak.h"

namespace fastattn {
namespace FASTATTN_ISA {

#ifdef __AVX512BF16__
using BF16Words = Pairs;
#else
using BF16Words = Single<F32>;
#endif

// Calls f(words, storage type) for a dtype.
template <class F>
auto for_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Single<F32>{}, float{});
    case DType::kFloat64:
      return f(Single<F64>{}, double{});
    case DType::kBFloat16:
      return f(BF16Words{}, bf16{});
    default:
      return f(Single<F32>{}, fp16{});
  }
}

static int run_panel_rows(DType dtype) {
  return for_dtype(dtype, [](auto words, auto) { return Panel<typename decltype(words)::Vector>::kLanes; });
}

static void run_append_kv(const Params& p, int64_t b, int64_t head_kv) {
  for_dtype(p.dtype, [&](auto words, auto type) {
    append_kv_job<typename decltype(words)::Scalar, decltype(type)>(p, b, head_kv);
  });
}

static void run_rotate_queries(const Params& p, const View& to, int64_t b, int64_t head) {
  for_dtype(p.dtype, [&](auto words, auto type) {
    rotate_queries_job<typename decltype(words)::Scalar, decltype(type)>(p, to, b, head);
  });
}

static size_t run_forward_scratch(const Params& p) {
  return for_dtype(p.dtype, [&](auto words, auto) {
    const size_t forward = forward_scratch<decltype(words)>(p), decode = decode_scratch<decltype(words)>(p);
    return forward > decode ? forward : decode;
  });
}

static void run_forward(const Params& p, const ForwardJob& job, const Splits& splits, void* scratch) {
  for_dtype(p.dtype, [&](auto words, auto type) {
    using V = typename decltype(words)::Vector;
    if (is_decode<V>(p, sequence_of(p, job.b))) {
      decode_job<decltype(words), decltype(type)>(p, job, splits, scratch);
    } else {
      forward_job<decltype(words), decltype(type)>(p, job, splits, scratch);
    }
  });
}

static void run_combine(const Params& p, const ForwardJob& job, const Splits& splits) {
  for_dtype(p.dtype, [&](auto words, auto type) {
    combine_job<typename decltype(words)::Vector, decltype(type)>(p, job, splits);
  });
}

static size_t run_backward_scratch(const Params& p) {
  return for_dtype(p.dtype, [&](auto words, auto) { return backward_scratch<decltype(words)>(p); });
}

static void run_bwd_preprocess(const Params& p, const BackwardBuffers& buffers, int64_t b, int64_t head) {
  for_dtype(p.dtype, [&](auto words, auto type) {
    bwd_preprocess_job<typename decltype(words)::Vector, decltype(type)>(p, buffers, b, head);
  });
}

static void run_backward(const Params& p, const BackwardJob& job, const BackwardBuffers& buffers, void* scratch) {
  for_dtype(p.dtype,
            [&](auto words, auto type) { backward_job<decltype(words), decltype(type)>(p, job, buffers, scratch); });
}

static void run_sum_dq(const Params& p, const BackwardJob& job, const BackwardBuffers& buffers) {
  for_dtype(p.dtype, [&](auto words, auto type) {
    sum_dq_job<typename decltype(words)::Vector, decltype(type)>(p, job, buffers);
  });
}

static void run_bwd_dbias(const Params& p, const DbiasJob& job, const BackwardBuffers& buffers, void* scratch) {
  for_dtype(p.dtype,
            [&](auto words, auto type) { bwd_dbias_job<decltype(words), decltype(type)>(p, job, buffers, scratch); });
}

static void run_bwd_dsinks(const Params& p, const BackwardBuffers& buffers, int64_t head) {
  for_dtype(p.dtype, [&](auto words, auto) { bwd_dsinks_job<typename decltype(words)::Vector>(p, buffers, head); });
}

static int64_t run_multiply_adds(DType dtype, int64_t steps) {
  return for_dtype(dtype, [&](auto words, auto) {
    volatile typename decltype(words)::Scalar sink = 0;
    return multiply_adds<decltype(words)>(steps, &sink);
  });
}

extern const Kernels kKernels;
const Kernels kKernels = {
    FASTATTN_ISA_NAME, run_panel_rows, run_append_kv,        run_rotate_queries, run_forward_scratch,
    run_forward,       run_combine,    run_backward_scratch, run_bwd_preprocess, run_backward,
    run_sum_dq,        run_bwd_dbias,  run_bwd_dsinks,       run_multiply_adds,
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
