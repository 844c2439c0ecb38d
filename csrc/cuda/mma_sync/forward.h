// Forward pass: one block of threads computes kBlockM queries of one head, over the keys that they see.
//
// Cost: 4 * head_dim flops and one exponential per score; each query is read once, each key and value once per tile. On
// an A100 the tensor cores bound it: 4 cycles per product, against 1 to 2 of floating point and 1 to 2 of exponentials.
// So what counts is how few instructions stand between products. The tile sizes follow from registers: 32 rows per warp
// use each fragment of K and V twice, and leave room for Q and the accumulators up to head_dim 128.
//
// Blocks of keys go upward. `masked_block` masks and raises row_max; `full_block` does neither. It is right for blocks
// that every row sees in full while no probability grows too large for a row_max that lags. The sums tell afterwards;
// if one has, the block is done again as a masked block.
#pragma once

#include "../common/arguments.h"
#include "../common/block_info.h"
#include "../common/element.h"
#include "../common/online_softmax.h"
#include "epilogue.h"
#include "kv_copy.h"
#include "mma.h"

namespace fastattn {
namespace cuda {

template <class T>
class Forward {
  using Element = typename T::Element;
  using Tile16 = float[T::kRowTiles][2][4];  // products of the warp's rows with 16 keys
  static constexpr int kStep = Mask::kStep;
  // Of each warp, the row tiles whose queries and out pass through shared memory at once.
  static constexpr int kStaged = T::kRowTiles * T::kQueryRows / T::kBlockM;

 public:
  __device__ __forceinline__ Forward(const Arguments& a, const BlockInfo& info, uint32_t shared)
      : p_(a.p),
        info_(info),
        shared_(shared),
        mask_(info.mask),
        score_mod_(a, info.b, info.head, mask_.diagonal_offset),
        key_(info.columns.n_begin),
        copy_(p_, info),
        offset_k_(lane_offset_b<T::kHeadDim>(lane())),
        offset_v_(lane_offset_a<T::kHeadDim>(lane())) {
    clear(acc_);
  }

  __device__ __forceinline__ void run() {
    load_queries();
    if (key_ >= info_.columns.full_begin && key_ + T::kBlockN <= info_.columns.full_end) start();
    while (key_ < info_.columns.n_end) {
      bool loaded = false;
      if (key_ >= info_.columns.full_begin && softmax_.ready())
        for (; key_ + T::kBlockN <= info_.columns.full_end; key_ += T::kBlockN) {
          next_block();
          loaded = !full_block();
          if (loaded) break;
        }
      if (key_ >= info_.columns.n_end) break;
      if (!loaded) next_block();
      masked_block();
      key_ += T::kBlockN;
    }
    store();
  }

 private:
  // Computed where they are needed: registers are short here.
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 * T::kWarpRows; }

  // The queries, and the first block of keys and values.
  __device__ __forceinline__ void load_queries() {
    using Copy = typename T::template Copy<T::kQueryRows>;
    const uint32_t at = shared_ + T::kQueriesAt;
    Copy queries(p_.q, info_.b, info_.head, info_.sequence.q_begin + info_.first_row, int(p_.head_dim));
#pragma unroll
    for (int row = 0; row < T::kBlockM; row += T::kQueryRows) {
      queries.issue(at + Copy::offset(), info_.last_row + 1 - info_.first_row - row - Copy::row());
      if (row == 0) copy_.issue(shared_, info_.columns.n_end - key_);
      queries.wait(at + Copy::offset());
      __syncthreads();
      const bool mine = T::kQueryRows == T::kBlockM || warp_row() / T::kQueryRows * T::kQueryRows == row;
      if (mine) q_.load(at + (warp_row() - row) * T::kHeadDim * 2, lane());
      // All have their queries; more, or the first block, go to the same place.
      if (row + T::kQueryRows < T::kBlockM || T::kQueriesAt < T::kStageBytes) __syncthreads();
    }
    copy_.advance(shared_, info_.columns.n_end - key_);
    stage_ = T::kStageBytes;
  }

  // Takes the first row_max from the first 16 keys.
  __device__ __forceinline__ void start() {
    // The keys have arrived for all; with the queries, except in copies through registers.
    if (T::template Copy<T::kBlockN>::kThroughRegisters) __syncthreads();
    Tile16 s;
    multiply_transposed<Element, T::kHeadDim>(s, q_, shared_ + offset_k_);
    scores(s, key_);
    softmax_.start(s);
  }

  // Turns to the next block, and issues the one after it.
  __device__ __forceinline__ void next_block() {
    copy_.wait(next_stage());
    __syncthreads();  // the block has arrived for all, and all are done with the one before
    stage_ ^= T::kStageBytes;
    copy_.issue(next_stage(), rows_left());
  }

  // Where the block after this one goes, and how many of its keys exist.
  __device__ __forceinline__ uint32_t next_stage() const { return shared_ + (stage_ ^ T::kStageBytes); }
  __device__ __forceinline__ int rows_left() const { return info_.columns.n_end - key_ - T::kBlockN; }

  // Where this lane reads keys and values of the current block.
  __device__ __forceinline__ uint32_t keys() const { return shared_ + stage_ + offset_k_; }
  __device__ __forceinline__ uint32_t values() const { return shared_ + stage_ + T::kTileBytes + offset_v_; }

  __device__ __forceinline__ int seqlen_q() const { return static_cast<int>(info_.sequence.q_length); }

  __device__ __forceinline__ int row_of(int m, int r) const {
    return info_.first_row + warp_row() + m * 16 + r * 8 + lane() / 4;
  }

  // Key of an element of a product, from the product's first one on.
  __device__ __forceinline__ int column_of(int n, int e) const { return n * 8 + lane() % 4 * 2 + e; }

  // Products to probabilities, for rows that have a row_max.
  __device__ __forceinline__ void probabilities(Tile16& s, int key) const {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 8; ++e)
        s[m][e / 4][e % 4] = score_mod_.probability(s[m][e / 4][e % 4], row_of(m, e % 4 / 2),
                                                    key + column_of(e / 4, e % 2), softmax_.row_max[m][e % 4 / 2]);
  }

  // Returns false, with nothing changed, if a probability may have grown too large.
  __device__ __forceinline__ bool full_block() {
    uint32_t probs[T::kBlockN / kStep][T::kRowTiles][4];
    float sums[T::kRowTiles][2] = {};
    static_for<T::kBlockN / kStep>([&](auto c) {
      Tile16 s;
      multiply_transposed<Element, T::kHeadDim, c * kStep>(s, q_, keys());
      probabilities(s, key_ + c * kStep);
      softmax_.accumulate(sums, s);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) pack<Element>(probs[c][m], s[m]);
    });
    if (!softmax_.fits(sums, Element::kLargestSum)) return false;
    softmax_.update(sums);
    copy_.advance(next_stage(), rows_left());
    static_for<T::kBlockN / kStep>(
        [&](auto c) { multiply<Element, T::kHeadDim, c * kStep>(acc_, probs[c], values()); });
    return true;
  }

  __device__ __forceinline__ void masked_block() {
    const int warp_first = min(info_.first_row + warp_row(), info_.last_row);
    const int warp_last = min(info_.first_row + warp_row() + T::kWarpRows - 1, info_.last_row);
    const MaskedSteps steps = mask_.steps<Rows::kQueries, T::kBlockN>(warp_first, warp_last, key_, seqlen_q());
    bool ready = softmax_.ready();
#pragma unroll 1
    for (int c = steps.begin; c < steps.end; ++c) masked_step(c, ready, Mask::sides(steps, key_ + c * kStep));
    copy_.advance(next_stage(), rows_left());
  }

  // 16 keys of the block. `ready`: each row of the warp has a row_max.
  __device__ __forceinline__ void masked_step(int c, bool& ready, Sides sides) {
    const int key = key_ + c * kStep, row_offset = c * kStep * T::kHeadDim * 2;
    Tile16 s;
    float sums[T::kRowTiles][2] = {};
    bool done = false;
    if (ready) {
      multiply_transposed<Element, T::kHeadDim>(s, q_, keys() + row_offset);
      probabilities(s, key);
      hide(s, key, sides, 0.0f);
      softmax_.accumulate(sums, s);
      done = softmax_.fits(sums, Element::kLargestSum);
    }
    if (!done) {
      multiply_transposed<Element, T::kHeadDim>(s, q_, keys() + row_offset);
      scores(s, key);
      hide(s, key, sides, -INFINITY);
      softmax_.rescale(s, acc_);
      ready = softmax_.ready();
      softmax_.probabilities(s);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) sums[m][0] = sums[m][1] = 0.0f;
      softmax_.accumulate(sums, s);
    }
    softmax_.update(sums);
    uint32_t probs[T::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) pack<Element>(probs[m], s[m]);
    multiply<Element, T::kHeadDim>(acc_, probs, values() + row_offset);
  }

  // Products to scores.
  __device__ __forceinline__ void scores(Tile16& s, int key) const {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 8; ++e)
        s[m][e / 4][e % 4] = score_mod_(s[m][e / 4][e % 4], row_of(m, e % 4 / 2), key + column_of(e / 4, e % 2));
  }

  __device__ __forceinline__ void hide(Tile16& x, int key, Sides sides, float value) const {
    const auto row = [&](int m, int r) { return min(row_of(m, r), info_.last_row); };
    mask_.hide<Rows::kQueries>(x, sides, row, key + column_of(0, 0), seqlen_q(), value);
  }

  __device__ __forceinline__ void store() {
    copy_.wait(next_stage());
    __syncthreads();  // all are done with the last block; out passes through its place
    const float* sinks = static_cast<const float*>(p_.sinks.data);
    // Rows after the last sequence belong to none, and have no sink.
    const bool no_sink = sinks == nullptr || info_.b == p_.batch;
    const float sink = no_sink ? -INFINITY : sinks[info_.head * p_.sinks.stride_h] * kLog2E;
    float* lse = static_cast<float*>(p_.lse.data);
    const bool stores = lane() % 4 == 0 && lse != nullptr;
    lse += info_.b * p_.lse.stride_b + info_.head * p_.lse.stride_h +
           (info_.sequence.q_begin + row_of(0, 0)) * p_.lse.stride_s;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowEnd end = finalize(softmax_.row_max[m][r], quad_sum(softmax_.row_sum[m][r]), sink);
        if (stores && row_of(m, r) <= info_.last_row) lse[(m * 16 + r * 8) * p_.lse.stride_s] = end.lse * kLn2;
#pragma unroll
        for (int n = 0; n < T::kHeadDim / 8; ++n) acc_[m][n][2 * r] *= end.factor, acc_[m][n][2 * r + 1] *= end.factor;
      }
    }
    const auto store_as = [&](auto element, const View& out) {
      store_products<decltype(element), T::kHeadDim, kStaged>(out, info_, info_.sequence.q_begin, warp_row(),
                                                              int(p_.head_dim_v), acc_, 1.0f, lane());
    };
    store_as(Element(), p_.out);
    if (p_.residual.data == nullptr) return;
    __syncwarp();
    store_as(RoundingError<Element>(), p_.residual);
  }

  const Params& p_;
  const BlockInfo& info_;
  uint32_t shared_, stage_;
  const Mask& mask_;
  int key_;  // where the current block begins
  ScoreMod<T::kHasScoreMod> score_mod_;
  KeyValueCopy<typename T::template Copy<T::kBlockN>> copy_;
  uint32_t offset_k_, offset_v_;
  typename T::QOperand q_;
  OnlineSoftmax<T::kRowTiles> softmax_;
  float acc_[T::kRowTiles][T::kHeadDim / 8][4];
};

template <class T>
__device__ __forceinline__ void forward(const Arguments& a) {
  __shared__ BlockInfo info;  // rarely needed, and registers are
  if (threadIdx.x == 0) info = block_info<T::kBlockM, Rows::kQueries>(a.p);
  __syncthreads();
  if (info.last_row < info.first_row) return;
  Forward<T>(a, info, shared_address(dynamic_shared_memory())).run();
}

}  // namespace cuda
}  // namespace fastattn
