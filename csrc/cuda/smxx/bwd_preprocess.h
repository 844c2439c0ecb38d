// Numbers of each query that the gradients need, computed before them:
//   lse_log2   its lse in units of log2, so that a probability is exp2(score - lse_log2); +inf if it sees no key
//   neg_delta  -delta = dlse - rowsum(dout * out): what each dout . v is added to
// and the gradient of the sinks, which follows from these alone. The rounding error of out counts: without it, all
// score gradients of a row would be off with one sign. Cost: out, residual and dout are read once.
#pragma once

#include "../common/arguments.h"
#include "../common/grid.h"
#include "../common/score_mod.h"
#include "../common/shared_memory.h"
#include "../common/swizzle.h"

namespace fastattn {
namespace cuda {

// The index of a query in lse_log2 and neg_delta; row counts from the start of the batch entry.
__device__ __forceinline__ int64_t row_index(const Params& p, int64_t b, int head, int64_t row) {
  return (b * p.heads_q + head) * p.seqlen_q + row;
}

template <class Element_>
struct BwdPreprocessTraits {
  using Element = Element_;
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 0;
  static constexpr int kLanes = 8;  // per row, so that a row's chunks are read 128 bytes at once
  static constexpr int kBlockRows = 4 * kThreads / kLanes;
};

// Of 8 elements each. What is multiplied with 0 does not count, not even NaN: out is 0 in rows that see no key, whose
// dout may hold anything.
template <class Element>
__device__ __forceinline__ float dot(const uint4& x, const uint4& y) {
  const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 a = Element::unpack(xs[i]), b = Element::unpack(ys[i]);
    sum = fmaf(a.x, a.x == 0.0f ? 0.0f : b.x, fmaf(a.y, a.y == 0.0f ? 0.0f : b.y, sum));
  }
  return sum;
}

template <class T>
__device__ __forceinline__ void bwd_preprocess(const Arguments& a) {
  const Params& p = a.p;
  const int64_t tiles_per_head = tiles(p.seqlen_q, 1, false, T::kBlockRows);
  const int64_t first = blockIdx.x % tiles_per_head * T::kBlockRows, b = blockIdx.x / tiles_per_head / p.heads_q;
  const int head = static_cast<int>(blockIdx.x / tiles_per_head % p.heads_q), lane = threadIdx.x % T::kLanes;
  const auto row_of = [&](const View& x, int64_t row) {
    return static_cast<const char*>(x.data) + (b * x.stride_b + head * x.stride_h + row * x.stride_s) * 2;
  };
  const auto at = [&](const View& x, int64_t row) {
    return static_cast<const float*>(x.data)[b * x.stride_b + head * x.stride_h + row * x.stride_s];
  };
#pragma unroll
  for (int i = 0; i < T::kBlockRows * T::kLanes; i += T::kThreads) {
    const int64_t row = first + (i + threadIdx.x) / T::kLanes;
    float delta = 0.0f;
    if (row < p.seqlen_q)
      for (int chunk = lane; chunk * kChunkElements < p.head_dim_v; chunk += T::kLanes) {
        const auto load = [&](const View& x) {
          return *reinterpret_cast<const uint4*>(row_of(x, row) + chunk * kChunkBytes);
        };
        const uint4 dout = load(p.dout);
        delta += dot<typename T::Element>(load(p.out), dout);
        if (p.residual.data != nullptr) delta += dot<typename T::Element>(load(p.residual), dout) / kResidualScale;
      }
#pragma unroll
    for (int distance = 1; distance < T::kLanes; distance *= 2) delta += __shfl_xor_sync(0xffffffffu, delta, distance);
    if (row >= p.seqlen_q || lane != 0) continue;
    const float lse = at(p.lse, row), dlse = p.dlse.data != nullptr ? at(p.dlse, row) : 0.0f;
    a.lse_log2[row_index(p, b, head, row)] = lse == -INFINITY ? INFINITY : lse * kLog2E;
    a.neg_delta[row_index(p, b, head, row)] = dlse - delta;
  }
}

struct BwdDsinksTraits {
  static constexpr int kThreads = 256;
  static constexpr int kSharedBytes = kThreads * 4;
  static constexpr int kBlockRows = 1;
};

// One block per head: sums over its rows in an order that depends on nothing but their number.
template <class T>
__device__ __forceinline__ void bwd_dsinks(const Arguments& a) {
  const Params& p = a.p;
  const int head = blockIdx.x;
  const float sink = static_cast<const float*>(p.sinks.data)[head * p.sinks.stride_h] * kLog2E;
  const int64_t entries = p.cu_seqlens_q != nullptr ? 1 : p.batch;
  float sum = 0.0f;
  for (int64_t b = 0; b < entries; ++b)
    for (int64_t row = threadIdx.x; row < p.seqlen_q; row += T::kThreads) {
      const float lse = a.lse_log2[row_index(p, b, head, row)];
      if (lse != INFINITY) sum += ptx::ex2_approx(sink - lse) * a.neg_delta[row_index(p, b, head, row)];
    }
  float* sums = reinterpret_cast<float*>(dynamic_shared_memory());
  sums[threadIdx.x] = sum;
  for (int half = T::kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) static_cast<float*>(p.dsinks.data)[head * p.dsinks.stride_h] = sums[0];
}

}  // namespace cuda
}  // namespace fastattn
