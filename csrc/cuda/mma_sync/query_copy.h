// Copies of queries, dout, lse and -delta, for bwd_dkdv.
#pragma once

#include "../common/arguments.h"
#include "../common/block_info.h"
#include "../common/tile_copy.h"
#include "../smxx/bwd_preprocess.h"

namespace fastattn {
namespace cuda {

// The queries of all heads that share a key/value head, block after block. Copies through registers have either queries
// or the rest under way.
template <class T>
class QueryCopy {
  using Copy = typename T::template Copy<T::kBlockM>;

 public:
  __device__ __forceinline__ QueryCopy(const Arguments& a, const BlockInfo& info)
      : a_(a),
        info_(info),
        q_(a.p.q, info.b, info.head * info.group, first(), static_cast<int>(a.p.head_dim)),
        dout_(a.p.dout, info.b, info.head * info.group, first(), static_cast<int>(a.p.head_dim_v)),
        row_value_((threadIdx.x < T::kBlockM ? a.lse_log2 : a.neg_delta) +
                   row_index(a.p, a.p.cu_seqlens_q != nullptr ? 0 : info.b, info.head * info.group, first() + row())),
        offset_(ptx::kept(Copy::offset())) {}

  // Each block is issued, advanced and waited for at `stage`. Of its rows, `rows` exist; the others become 0.
  __device__ __forceinline__ void issue(uint32_t stage, int rows) {
    q_.issue(stage + offset_, rows - Copy::row());
    if constexpr (!Copy::kThroughRegisters) issue_rest(stage, rows);
  }
  __device__ __forceinline__ void advance(uint32_t stage, int rows) {
    if constexpr (Copy::kThroughRegisters) {
      q_.wait(stage + offset_);
      issue_rest(stage, rows);
    }
  }
  __device__ __forceinline__ void wait(uint32_t stage) {
    dout_.wait(stage + offset_ + T::kTileBytes);
    if (copies_row_value()) word_.wait(row_value_at(stage));
  }

  // Turns to the first block of the next head.
  __device__ __forceinline__ void next_head() {
    const int64_t rows = (info_.columns.n_end - info_.columns.n_begin + T::kBlockM - 1) / T::kBlockM * T::kBlockM;
    q_.skip(a_.p.q.stride_h - rows * a_.p.q.stride_s);
    dout_.skip(a_.p.dout.stride_h - rows * a_.p.dout.stride_s);
    row_value_ += a_.p.seqlen_q - rows;
  }

 private:
  // The first threads copy a query's lse, the next ones -delta. Each pair of rows is there twice, as a product's start
  // needs it.
  static_assert(2 * T::kBlockM <= T::kThreads, "a thread for each lse and -delta");
  static __device__ __forceinline__ bool copies_row_value() { return threadIdx.x < 2 * T::kBlockM; }
  static __device__ __forceinline__ int row() { return threadIdx.x % T::kBlockM; }
  static __device__ __forceinline__ uint32_t row_value_at(uint32_t stage) {
    const int pair = threadIdx.x & ~1;
    return stage + 2 * T::kTileBytes + 4 * (pair + threadIdx.x);
  }

  __device__ __forceinline__ void issue_rest(uint32_t stage, int rows) {
    dout_.issue(stage + offset_ + T::kTileBytes, rows - Copy::row());
    if (copies_row_value()) word_.issue(row_value_at(stage), row_value_, row() < rows);
    row_value_ += T::kBlockM;
  }

  __device__ __forceinline__ int64_t first() const { return info_.sequence.q_begin + info_.columns.n_begin; }

  const Arguments& a_;
  const BlockInfo& info_;
  Copy q_, dout_;
  typename Copy::Word word_;
  const float* row_value_;
  uint32_t offset_;
};

}  // namespace cuda
}  // namespace fastattn
