// Attention of few queries over a cache. One block of threads computes 16 rows, the queries of all heads that share a
// key/value head, over one split of the keys.
//
// Cost: 4 * head_dim flops per score, 16 scores for the 4 * head_dim bytes of a key and its value, which are read once.
// Memory bounds it by far, so what counts is how many bytes are under way. Each warp has its own blocks of 16 keys in a
// ring of its own, and waits for nobody until the end, when the warps are combined, in their order. All stages of the
// ring except one are under way at any time, 32 to 72 KiB for the block of threads. Together they stay within the
// shared memory that every GPU of compute capability 8.0 and up gives a block.
#pragma once

#include "../common/arguments.h"
#include "../common/combine_state.h"
#include "../common/element.h"
#include "../common/online_softmax.h"
#include "../common/packed_block_info.h"
#include "../mma_sync/mma.h"
#include "cache_copy.h"
#include "config.h"

namespace fastattn {
namespace cuda {
namespace sm80 {

template <class Element_, int kHeadDim_, bool kHasScoreMod_>
struct DecodeTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasScoreMod = kHasScoreMod_;
  static constexpr DecodeConfig kConfig = find_config(kDecode, kHeadDim, kHasScoreMod);
  static constexpr int kBlockRows = 16;
  static constexpr int kWarps = kConfig.warps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kTileBytes = kDecodeBlockN * kHeadDim * 2;  // of K or V
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kWarps * kRingBytes;
  static_assert(kSharedBytes <= 96 * 1024, "more than some GPUs have");
};

template <class T>
class Decode {
  using Element = typename T::Element;
  using Cache = CacheCopy<T::kHeadDim>;
  using Tile16 = float[1][2][4];  // products of the 16 rows with 16 keys
  using RowScoreMod = ScoreMod<T::kHasScoreMod>;

  // What a warp leaves in its ring: 16 rows of sums, padded so that rows are in different banks, and their states.
  static constexpr int kAccStride = T::kHeadDim + 8;
  struct WarpResult {
    float acc[T::kBlockRows][kAccStride];
    float row_max[T::kBlockRows], row_sum[T::kBlockRows];
  };
  static_assert(sizeof(WarpResult) <= T::kRingBytes, "fits where the keys were");

 public:
  // Blocks [n_block_begin, n_block_end) of the keys.
  __device__ __forceinline__ Decode(const Arguments& a, const PackedBlockInfo& info, int n_block_begin, int n_block_end)
      : a_(a),
        p_(a.p),
        info_(info),
        lane_(threadIdx.x % 32),
        n_block_(n_block_begin + warp()),
        n_block_end_(n_block_end),
        queries_{info.query(row_of(0)), info.query(row_of(1))},
        score_mods_{RowScoreMod(a, info.b, info.head(row_of(0)), info.mask.diagonal_offset),
                    RowScoreMod(a, info.b, info.head(row_of(1)), info.mask.diagonal_offset)},
        cache_(p_, info, n_block_, n_block_end, T::kWarps),
        ring_(shared_address(warp_result(warp()))),
        offset_to_(Cache::lane_offset()),
        offset_k_(lane_offset_b<T::kHeadDim>(lane_)),
        offset_v_(lane_offset_a<T::kHeadDim>(lane_)) {
    clear(acc_);
  }

  __device__ __forceinline__ void run() {
    for (int s = 0; s + 1 < T::kStages; ++s) cache_.issue(ring_ + s * T::kStageBytes + offset_to_);
    load_queries();
    for (; n_block_ < n_block_end_; n_block_ += T::kWarps) {
      ptx::cp_async_wait_group<T::kStages - 2>();
      // The block has arrived for all lanes, and all are done with the one before, where the next goes.
      __syncwarp();
      cache_.issue(ring_ + (stage_ == 0 ? T::kStages - 1 : stage_ - 1) * T::kStageBytes + offset_to_);
      attend(ring_ + stage_ * T::kStageBytes);
      stage_ = stage_ + 1 == T::kStages ? 0 : stage_ + 1;
    }
    leave_result();
    __syncthreads();
    store();
  }

 private:
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ WarpResult* warp_result(int warp) {
    extern __shared__ __align__(128) char memory[];
    return reinterpret_cast<WarpResult*>(memory + warp * T::kRingBytes);
  }

  // This lane's rows, r = 0 and 1.
  __device__ __forceinline__ int row_of(int r) const { return info_.first_row + lane_ / 4 + r * 8; }

  // The key of an element of a product, from the product's first one on.
  __device__ __forceinline__ int column_of(int e) const { return e / 4 * 8 + lane_ % 4 * 2 + e % 2; }

  // The queries as A operands, straight from memory; rows and columns that do not exist are 0.
  __device__ __forceinline__ void load_queries() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t at =
          info_.b * p_.q.stride_b + info_.head(row_of(r)) * p_.q.stride_h + queries_[r] * p_.q.stride_s + lane_ % 4 * 2;
      const uint16_t* from = static_cast<const uint16_t*>(p_.q.data) + at;
      const int columns = info_.exists(row_of(r)) ? static_cast<int>(p_.head_dim) : 0;
#pragma unroll
      for (int c = 0; c < T::kHeadDim; c += 8)
        q_.fragments[0][c / 16].r[r + c % 16 / 4] = c < columns ? *reinterpret_cast<const uint32_t*>(from + c) : 0;
    }
  }

  // 16 keys and values at `tile`.
  __device__ __forceinline__ void attend(uint32_t tile) {
    Tile16 s, probs;
    multiply_transposed<Element, T::kHeadDim>(s, q_, tile + offset_k_);
    scores(s);
    float sums[1][2];
    probabilities(s, probs, sums);
    if (!ready_ || !softmax_.fits(sums, Element::kLargestSum)) {
      softmax_.rescale(s, acc_);
      ready_ = softmax_.ready();
      probabilities(s, probs, sums);
    }
    softmax_.update(sums);
    uint32_t packed[1][4];
    pack<Element>(packed[0], probs[0]);
    multiply<Element, T::kHeadDim>(acc_, packed, tile + T::kTileBytes + offset_v_);
  }

  // Products to scores, -inf for keys that a row does not see.
  __device__ __forceinline__ void scores(Tile16& s) const {
    const int key = n_block_ * kDecodeBlockN;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int r = e % 4 / 2;
      s[0][e / 4][e % 4] = score_mods_[r](s[0][e / 4][e % 4], queries_[r], key + column_of(e));
    }
    if (key >= info_.columns.full_begin && key + kDecodeBlockN <= info_.columns.full_end) return;
#pragma unroll
    for (int e = 0; e < 8; ++e)
      info_.mask.hide<Rows::kQueries>(s[0][e / 4][e % 4], queries_[e % 4 / 2], key + column_of(e), 0, -INFINITY);
  }

  __device__ __forceinline__ void probabilities(const Tile16& s, Tile16& probs, float (&sums)[1][2]) const {
#pragma unroll
    for (int e = 0; e < 8; ++e) probs[0][e / 4][e % 4] = s[0][e / 4][e % 4];
    softmax_.probabilities(probs);
    sums[0][0] = sums[0][1] = 0.0f;
    softmax_.accumulate(sums, probs);
  }

  __device__ __forceinline__ void leave_result() {
    __syncwarp();  // all lanes are done with the last block, and all copies have been waited for
    WarpResult& to = *warp_result(warp());
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane_ / 4 + r * 8;
      const float sum = quad_sum(softmax_.row_sum[0][r]);
      if (lane_ % 4 == 0) to.row_max[row] = softmax_.row_max[0][r], to.row_sum[row] = sum;
#pragma unroll
      for (int n = 0; n < T::kHeadDim / 8; ++n)
        *reinterpret_cast<float2*>(&to.acc[row][n * 8 + lane_ % 4 * 2]) = {acc_[0][n][2 * r], acc_[0][n][2 * r + 1]};
    }
  }

  // Combines the warps: 4 elements of a row per thread and step.
  __device__ __forceinline__ void store() const {
    constexpr int kSteps = T::kHeadDim / 4;
    for (int e = threadIdx.x; e < T::kBlockRows * kSteps; e += T::kThreads) {
      const int row = e / kSteps, column = e % kSteps * 4;
      if (!info_.exists(info_.first_row + row)) continue;
      CombineState state;
#pragma unroll
      for (int w = 0; w < T::kWarps; ++w) state.update_max(warp_result(w)->row_max[row]);
      float4 x = {};
#pragma unroll
      for (int w = 0; w < T::kWarps; ++w) {
        const float weight = state.weight(warp_result(w)->row_max[row]);
        const float4 acc = *reinterpret_cast<const float4*>(&warp_result(w)->acc[row][column]);
        state.row_sum += weight * warp_result(w)->row_sum[row];
        x.x += weight * acc.x, x.y += weight * acc.y, x.z += weight * acc.z, x.w += weight * acc.w;
      }
      store(state, x, info_.head(info_.first_row + row), info_.query(info_.first_row + row), column);
    }
  }

  // The result, or that of this split.
  __device__ __forceinline__ void store(const CombineState& state, const float4& x, int head, int query,
                                        int column) const {
    const bool only = a_.splits == 1;
    const float* sinks = only ? static_cast<const float*>(p_.sinks.data) : nullptr;
    const float sink = sinks == nullptr ? -INFINITY : sinks[head * p_.sinks.stride_h] * kLog2E;
    const RowEnd end = finalize(state.row_max, state.row_sum, sink);
    const float4 out = {x.x * end.factor, x.y * end.factor, x.z * end.factor, x.w * end.factor};
    const bool exists = column < p_.head_dim_v;
    if (only) {
      if (exists) store<Element>(p_.out, head, query, column, out);
      if (exists && p_.residual.data != nullptr) store<RoundingError<Element>>(p_.residual, head, query, column, out);
      float* lse = static_cast<float*>(p_.lse.data);
      if (column == 0 && lse != nullptr)
        lse[info_.b * p_.lse.stride_b + head * p_.lse.stride_h + query * p_.lse.stride_s] = end.lse * kLn2;
    } else {
      const int64_t row = info_.accum_row(a_, head, query);
      if (exists) *reinterpret_cast<float4*>(a_.out_accum + row * p_.head_dim_v + column) = out;
      if (column == 0) a_.lse_accum[row] = end.lse;
    }
  }

  template <class As>
  __device__ __forceinline__ void store(const View& view, int head, int query, int column, const float4& x) const {
    const int64_t at = info_.b * view.stride_b + head * view.stride_h + query * view.stride_s + column;
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(view.data) + at) = {As::pack(x.x, x.y), As::pack(x.z, x.w)};
  }

  const Arguments& a_;
  const Params& p_;
  const PackedBlockInfo& info_;
  int lane_;
  int n_block_, n_block_end_, stage_ = 0;  // of this warp: the current block, and where in the ring it is
  int queries_[2];                         // of this lane's rows
  RowScoreMod score_mods_[2];
  Cache cache_;
  uint32_t ring_, offset_to_, offset_k_, offset_v_;
  RegisterOperand<1, T::kHeadDim> q_;
  OnlineSoftmax<1> softmax_;
  bool ready_ = false;  // each row has a row_max
  float acc_[1][T::kHeadDim / 8][4];
};

template <class T>
__device__ __forceinline__ void decode(const Arguments& a) {
  __shared__ PackedBlockInfo info;  // rarely needed, and registers are
  if (threadIdx.x == 0) info = PackedBlockInfo(a, T::kBlockRows);
  __syncthreads();
  const int n_begin = info.columns.n_begin, n_end = info.columns.n_end;
  const int first = n_begin / kDecodeBlockN;
  const int end = n_end > n_begin ? (n_end + kDecodeBlockN - 1) / kDecodeBlockN : first;
  // Splits share what there is to see, in whole steps of the block of threads.
  const int steps = (end - first + T::kWarps * a.splits - 1) / (T::kWarps * a.splits);
  const int n_block_begin = min(first + info.split * steps * T::kWarps, end);
  const int n_block_end = min(n_block_begin + steps * T::kWarps, end);
  if (n_block_begin < n_block_end || a.splits == 1) {
    Decode<T>(a, info, n_block_begin, n_block_end).run();
  } else if (threadIdx.x < T::kBlockRows && info.exists(info.first_row + threadIdx.x)) {  // nothing to see
    const int row = info.first_row + threadIdx.x;
    a.lse_accum[info.accum_row(a, info.head(row), info.query(row))] = -INFINITY;
  }
}

}  // namespace sm80
}  // namespace cuda
}  // namespace fastattn
