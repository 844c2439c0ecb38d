// Copies of queries, with dout and their statistics, for the gradients of keys and values.
#pragma once

#include "../common/arguments.h"
#include "../common/block_info.h"
#include "../common/tile_copy.h"
#include "../smxx/bwd_preprocess.h"

namespace fastattn {
namespace cuda {

// The queries of all heads that share a head of keys, block after block, with dout and their statistics. Copies that
// take registers have either queries or the rest under way.
template <class T>
class QueryCopy {
  using Copy = typename T::template Copy<T::kBlockM>;

 public:
  __device__ __forceinline__ QueryCopy(const Arguments& a, const Tile& tile)
      : a_(a),
        tile_(tile),
        queries_(a.p.q, tile.b, tile.head * tile.group, first(), static_cast<int>(a.p.head_dim)),
        douts_(a.p.dout, tile.b, tile.head * tile.group, first(), static_cast<int>(a.p.head_dim_v)),
        statistic_((threadIdx.x < T::kBlockM ? a.row_lse : a.minus_delta) +
                   statistic(a.p, a.p.cu_seqlens_q != nullptr ? 0 : tile.b, tile.head * tile.group, first() + row())),
        offset_(ptx::kept(Copy::offset())) {}

  // Each block is asked for, comes halfway, and lands at `stage`. Of its rows, `rows` exist; the others become 0.
  __device__ __forceinline__ void ask(uint32_t stage, int rows) {
    queries_.ask(stage + offset_, rows - Copy::row());
    if constexpr (!Copy::kTakesRegisters) ask_rest(stage, rows);
  }
  __device__ __forceinline__ void halfway(uint32_t stage, int rows) {
    if constexpr (Copy::kTakesRegisters) {
      queries_.land(stage + offset_);
      ask_rest(stage, rows);
    }
  }
  __device__ __forceinline__ void land(uint32_t stage) {
    douts_.land(stage + offset_ + T::kTileBytes);
    if (has_statistic()) word_.land(statistic_at(stage));
  }

  // Turns to the first block of the next head.
  __device__ __forceinline__ void next_head() {
    const int64_t rows = (tile_.end - tile_.first + T::kBlockM - 1) / T::kBlockM * T::kBlockM;
    queries_.skip(a_.p.q.stride_h - rows * a_.p.q.stride_s);
    douts_.skip(a_.p.dout.stride_h - rows * a_.p.dout.stride_s);
    statistic_ += a_.p.seqlen_q - rows;
  }

 private:
  // The first threads copy a query's lse, the next ones -delta. Each pair of rows lies there twice, as a product's
  // start has it.
  static_assert(2 * T::kBlockM <= T::kThreads, "a thread for each statistic");
  static __device__ __forceinline__ bool has_statistic() { return threadIdx.x < 2 * T::kBlockM; }
  static __device__ __forceinline__ int row() { return threadIdx.x % T::kBlockM; }
  static __device__ __forceinline__ uint32_t statistic_at(uint32_t stage) {
    const int pair = threadIdx.x & ~1;
    return stage + 2 * T::kTileBytes + 4 * (pair + threadIdx.x);
  }

  __device__ __forceinline__ void ask_rest(uint32_t stage, int rows) {
    douts_.ask(stage + offset_ + T::kTileBytes, rows - Copy::row());
    if (has_statistic()) word_.ask(statistic_at(stage), statistic_, row() < rows);
    statistic_ += T::kBlockM;
  }

  __device__ __forceinline__ int64_t first() const { return tile_.sequence.q_begin + tile_.first; }

  const Arguments& a_;
  const Tile& tile_;
  Copy queries_, douts_;
  typename Copy::Word word_;
  const float* statistic_;
  uint32_t offset_;
};

}  // namespace cuda
}  // namespace fastattn
