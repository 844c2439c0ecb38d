// Combines the results over the splits of a row's keys, and its sink, into the result over all of them.
//
// One block per row, so that even a single row with many splits reads several of them at once; its warps take turns.
// Each split is read once: memory bounds it. Sums have a fixed order.
#pragma once

#include "../common/arguments.h"
#include "../common/combine_state.h"
#include "../common/element.h"
#include "../common/online_softmax.h"

namespace fastattn {
namespace cuda {

template <class Element_>
struct CombineTraits {
  using Element = Element_;
  static constexpr int kLargestHeadDim = 256;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockRows = 1;
  static constexpr int kSharedBytes = kWarps * kLargestHeadDim * 4;
};

// The state of a row whose splits have these lses, `step` apart: the same in all lanes.
__device__ __forceinline__ CombineState combine_lses(const float* lse, int64_t step, int splits, int lane) {
  CombineState state;
  for (int s = lane; s < splits; s += 32) state.update_max(lse[s * step]);
  for (int apart = 16; apart > 0; apart /= 2) state.update_max(__shfl_xor_sync(kWholeWarp, state.row_max, apart));
  for (int s = lane; s < splits; s += 32) state.row_sum += state.weight(lse[s * step]);
  for (int apart = 16; apart > 0; apart /= 2) state.row_sum += __shfl_xor_sync(kWholeWarp, state.row_sum, apart);
  return state;
}

template <class T>
__device__ __forceinline__ void combine(const Arguments& a) {
  extern __shared__ __align__(16) float sums[];  // (warps, head_dim_v)
  const Params& p = a.p;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, columns = static_cast<int>(p.head_dim_v);
  const int64_t row = blockIdx.x, rows = p.batch * p.heads_q * p.seqlen_q;
  const int64_t i = row % p.seqlen_q, head = row / p.seqlen_q % p.heads_q, b = row / p.seqlen_q / p.heads_q;
  const float* lse = a.lse_accum + row;
  const CombineState state = combine_lses(lse, rows, a.splits, lane);
  for (int d = 4 * lane; d < columns; d += 4 * 32) {
    float4 sum = {};
#pragma unroll 4
    for (int s = warp; s < a.splits; s += T::kWarps) {
      const float split_lse = lse[s * rows];
      if (split_lse == -INFINITY) continue;  // its values were never written
      const float weight = state.weight(split_lse);
      const float4 x = *reinterpret_cast<const float4*>(a.out_accum + (s * rows + row) * columns + d);
      sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
    }
    *reinterpret_cast<float4*>(sums + warp * columns + d) = sum;
  }
  __syncthreads();
  const float* sinks = static_cast<const float*>(p.sinks.data);
  const float sink = sinks == nullptr ? -INFINITY : sinks[head * p.sinks.stride_h] * kLog2E;
  const RowEnd end = finalize(state.row_max, state.row_sum, sink);
  const auto row_of = [&](const View& x) {
    return static_cast<char*>(x.data) + (b * x.stride_b + head * x.stride_h + i * x.stride_s) * 2;
  };
  for (int d = 2 * threadIdx.x; d < columns; d += 2 * T::kThreads) {
    float2 sum = {};
    for (int w = 0; w < T::kWarps; ++w) sum.x += sums[w * columns + d], sum.y += sums[w * columns + d + 1];
    sum.x *= end.factor, sum.y *= end.factor;
    *reinterpret_cast<uint32_t*>(row_of(p.out) + d * 2) = T::Element::pack(sum.x, sum.y);
    if (p.residual.data != nullptr)
      *reinterpret_cast<uint32_t*>(row_of(p.residual) + d * 2) = RoundingError<typename T::Element>::pack(sum.x, sum.y);
  }
  if (threadIdx.x == 0 && p.lse.data != nullptr)
    static_cast<float*>(p.lse.data)[b * p.lse.stride_b + head * p.lse.stride_h + i * p.lse.stride_s] = end.lse * kLn2;
}

}  // namespace cuda
}  // namespace fastattn
