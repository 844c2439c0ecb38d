// Forward pass: one block of threads computes 128 queries of one head, over the keys that they see.
//
// Cost: 4 * head_dim flops and one exponential per score; each query is read once, each key and value once per tile.
// On an A100 the tensor cores bound it (4 cycles per product, against 1 to 2 of floating point and 1 to 2 of
// exponentials), so what counts is how few instructions stand between products. The tile sizes follow from registers:
// 32 rows per warp use each fragment of K and V twice, and leave room for Q beside the accumulators up to head_dim 128.
//
// Blocks of keys go upward. `careful_block` masks and keeps the references of the softmax; `quick_block` does neither.
// It is right for blocks that every row sees whole, while no probability grows too large for its stale reference,
// which the sums tell afterwards; if one has, the block is done again, carefully.
#pragma once

#include "../common/arguments.h"
#include "../common/block_info.h"
#include "../common/element.h"
#include "../common/mask.h"
#include "../common/online_softmax.h"
#include "../common/tile_copy.h"
#include "mma.h"

namespace fastattn {
namespace cuda {

template <class T>
class Forward {
  using Number = typename T::Number;
  using Tile16 = float[T::kRowTiles][2][4];  // products of the warp's rows with 16 keys
  static constexpr int kChunk = 16;          // keys per step
  // Of each warp, the row tiles whose queries and out pass through shared memory at once.
  static constexpr int kPassing = T::kRowTiles * T::kQueryRows / T::kRows;

 public:
  __device__ __forceinline__ Forward(const Arguments& a, const Tile& tile, uint32_t shared)
      : p_(a.p),
        tile_(tile),
        shared_(shared),
        sees_(tile.sees),
        scores_(a, tile.b, tile.head, sees_.offset),
        key_(tile.first),
        copy_(p_, tile),
        offset_k_(lane_offset_b<T::kHeadDim>(lane())),
        offset_v_(lane_offset_a<T::kHeadDim>(lane())) {
    clear(acc_);
  }

  __device__ __forceinline__ void run() {
    load_queries();
    if (whole_block()) start();
    while (key_ < tile_.end) {
      bool loaded = false;
      if (key_ >= tile_.whole_first && softmax_.ready())
        for (; key_ + T::kBlockN <= tile_.whole_end; key_ += T::kBlockN) {
          next_block();
          loaded = !quick_block();
          if (loaded) break;
        }
      if (key_ >= tile_.end) break;
      if (!loaded) next_block();
      careful_block();
      key_ += T::kBlockN;
    }
    store();
  }

 private:
  // Not kept: registers are what is short here.
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 * T::kWarpRows; }

  // Every row of the tile sees the whole of the current block.
  __device__ __forceinline__ bool whole_block() const {
    return key_ >= tile_.whole_first && key_ + T::kBlockN <= tile_.whole_end;
  }

  // The queries, and the first block of keys and values.
  __device__ __forceinline__ void load_queries() {
    using Copy = typename T::template Copy<T::kQueryRows>;
    const uint32_t at = shared_ + T::kQueryOffset;
    Copy queries(p_.q, tile_.b, tile_.head, tile_.sequence.q_begin + tile_.row, int(p_.head_dim));
#pragma unroll
    for (int row = 0; row < T::kRows; row += T::kQueryRows) {
      queries.ask(at + Copy::offset(), tile_.last_row + 1 - tile_.row - row - Copy::row());
      if (row == 0) copy_.ask(shared_, tile_.end - key_);
      queries.land(at + Copy::offset());
      __syncthreads();
      const bool mine = T::kQueryRows == T::kRows || warp_row() / T::kQueryRows * T::kQueryRows == row;
      if (mine) q_.load(at + (warp_row() - row) * T::kHeadDim * 2, lane());
      // All have their queries, where more go next or the first block does.
      if (row + T::kQueryRows < T::kRows || T::kQueryOffset < T::kStageBytes) __syncthreads();
    }
    copy_.halfway(shared_, tile_.end - key_);
    stage_ = T::kStageBytes;
  }

  // Takes the first references from the first 16 keys.
  __device__ __forceinline__ void start() {
    // The keys have arrived for all; with the queries, unless they took registers.
    if (T::template Copy<T::kBlockN>::kTakesRegisters) __syncthreads();
    Tile16 s;
    multiply_transposed<Number, T::kHeadDim>(s, q_, shared_ + offset_k_);
    scores(s, key_);
    softmax_.start(s);
  }

  // Turns to the next block, and asks for the one after it.
  __device__ __forceinline__ void next_block() {
    copy_.land(next_stage());
    __syncthreads();  // the block has arrived for all, and all are done with the one before
    stage_ ^= T::kStageBytes;
    copy_.ask(next_stage(), rows_left());
  }

  // Where the block after this one goes, and how many of its keys exist.
  __device__ __forceinline__ uint32_t next_stage() const { return shared_ + (stage_ ^ T::kStageBytes); }
  __device__ __forceinline__ int rows_left() const { return tile_.end - key_ - T::kBlockN; }

  // Where this lane reads keys and values of the current block.
  __device__ __forceinline__ uint32_t keys() const { return shared_ + stage_ + offset_k_; }
  __device__ __forceinline__ uint32_t values() const { return shared_ + stage_ + T::kTileBytes + offset_v_; }

  __device__ __forceinline__ int row_of(int m, int r) const {
    return tile_.row + warp_row() + m * 16 + r * 8 + lane() / 4;
  }

  // Key of an element of a product, from the product's first one on.
  __device__ __forceinline__ int column_of(int n, int e) const { return n * 8 + lane() % 4 * 2 + e; }

  // Products to probabilities, for rows that have references.
  __device__ __forceinline__ void probabilities(Tile16& s, int key) const {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 8; ++e)
        s[m][e / 4][e % 4] = scores_.probability(s[m][e / 4][e % 4], row_of(m, e % 4 / 2),
                                                 key + column_of(e / 4, e % 2), softmax_.reference[m][e % 4 / 2]);
  }

  // Returns false, with nothing changed, if a probability may have grown too large.
  __device__ __forceinline__ bool quick_block() {
    uint32_t probs[T::kBlockN / kChunk][T::kRowTiles][4];
    float sums[T::kRowTiles][2] = {};
    unrolled<T::kBlockN / kChunk>([&](auto c) {
      Tile16 s;
      multiply_transposed<Number, T::kHeadDim, c * kChunk>(s, q_, keys());
      probabilities(s, key_ + c * kChunk);
      softmax_.sum_up(sums, s);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) pack<Number>(probs[c][m], s[m]);
    });
    if (!softmax_.fits(sums, Number::kLargestSum)) return false;
    softmax_.add(sums);
    copy_.halfway(next_stage(), rows_left());
    unrolled<T::kBlockN / kChunk>([&](auto c) { multiply<Number, T::kHeadDim, c * kChunk>(acc_, probs[c], values()); });
    return true;
  }

  __device__ __forceinline__ void careful_block() {
    const int warp_first = min(tile_.row + warp_row(), tile_.last_row);
    const int warp_last = min(tile_.row + warp_row() + T::kWarpRows - 1, tile_.last_row);
    const int whole_first = sees_.first(warp_last), whole_last = sees_.last(warp_first);
    const int first = max(sees_.first(warp_first) - key_, 0) / kChunk;
    const int end = min((sees_.last(warp_last) - key_ + kChunk - 1) / kChunk, T::kBlockN / kChunk);
    bool ready = softmax_.ready();
#pragma unroll 1
    for (int c = first; c < end; ++c) {
      const int key = key_ + c * kChunk;
      careful_chunk(c, ready, key<whole_first, key + kChunk> whole_last);
    }
    copy_.halfway(next_stage(), rows_left());
  }

  // 16 keys of the block, some of which may be hidden to the left or right of what some rows see. `ready`: each row of
  // the warp has a reference.
  __device__ __forceinline__ void careful_chunk(int c, bool& ready, bool hides_left, bool hides_right) {
    const int key = key_ + c * kChunk, row_offset = c * kChunk * T::kHeadDim * 2;
    Tile16 s;
    float sums[T::kRowTiles][2] = {};
    bool done = false;
    if (ready) {
      multiply_transposed<Number, T::kHeadDim>(s, q_, keys() + row_offset);
      probabilities(s, key);
      hide_unseen(s, key, hides_left, hides_right, 0.0f);
      softmax_.sum_up(sums, s);
      done = softmax_.fits(sums, Number::kLargestSum);
    }
    if (!done) {
      multiply_transposed<Number, T::kHeadDim>(s, q_, keys() + row_offset);
      scores(s, key);
      hide_unseen(s, key, hides_left, hides_right, -INFINITY);
      softmax_.renew(s, acc_);
      ready = softmax_.ready();
      softmax_.probabilities(s);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) sums[m][0] = sums[m][1] = 0.0f;
      softmax_.sum_up(sums, s);
    }
    softmax_.add(sums);
    uint32_t probs[T::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) pack<Number>(probs[m], s[m]);
    multiply<Number, T::kHeadDim>(acc_, probs, values() + row_offset);
  }

  // Products to scores.
  __device__ __forceinline__ void scores(Tile16& s, int key) const {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 8; ++e)
        s[m][e / 4][e % 4] = scores_(s[m][e / 4][e % 4], row_of(m, e % 4 / 2), key + column_of(e / 4, e % 2));
  }

  // Gives what a row does not see a value of its own.
  __device__ __forceinline__ void hide_unseen(Tile16& x, int key, bool left, bool right, float value) const {
    const int column = key + column_of(0, 0);
    hide(
        x, left, right, [&](int m, int r) { return sees_.first(min(row_of(m, r), tile_.last_row)) - column; },
        [&](int m, int r) { return sees_.last(min(row_of(m, r), tile_.last_row)) - column; }, value);
  }

  __device__ __forceinline__ void store() {
    copy_.land(next_stage());
    __syncthreads();  // all are done with the last block, where out passes through
    const float* sinks = static_cast<const float*>(p_.sinks.data);
    // Rows behind the last sequence belong to none, and have no sink.
    const bool no_sink = sinks == nullptr || tile_.b == p_.batch;
    const float sink = no_sink ? -INFINITY : sinks[tile_.head * p_.sinks.stride_h] * kLog2E;
    float* lse = static_cast<float*>(p_.lse.data);
    const bool stores = lane() % 4 == 0 && lse != nullptr;
    lse += tile_.b * p_.lse.stride_b + tile_.head * p_.lse.stride_h +
           (tile_.sequence.q_begin + row_of(0, 0)) * p_.lse.stride_s;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowEnd end(softmax_.reference[m][r], quad_sum(softmax_.sum[m][r]), sink);
        if (stores && row_of(m, r) <= tile_.last_row) lse[(m * 16 + r * 8) * p_.lse.stride_s] = end.lse * kLn2;
#pragma unroll
        for (int n = 0; n < T::kHeadDim / 8; ++n) acc_[m][n][2 * r] *= end.factor, acc_[m][n][2 * r + 1] *= end.factor;
      }
    }
    const auto store_as = [&](auto number, const View& out) {
      store_products<decltype(number), T::kHeadDim, kPassing>(out, tile_, tile_.sequence.q_begin, warp_row(),
                                                              int(p_.head_dim_v), acc_, 1.0f, lane());
    };
    store_as(Number(), p_.out);
    if (p_.residual.data == nullptr) return;
    __syncwarp();
    store_as(RoundedOff<Number>(), p_.residual);
  }

  const Params& p_;
  const Tile& tile_;
  uint32_t shared_, stage_;
  const Visibility& sees_;
  int key_;  // where the current block begins
  Scores<T::kGeneral> scores_;
  KeyValueCopy<typename T::template Copy<T::kBlockN>> copy_;
  uint32_t offset_k_, offset_v_;
  typename T::Queries q_;
  Softmax<T::kRowTiles> softmax_;
  float acc_[T::kRowTiles][T::kHeadDim / 8][4];
};

template <class T>
__device__ __forceinline__ void forward(const Arguments& a) {
  __shared__ Tile tile;  // rarely needed, and registers are
  if (threadIdx.x == 0) tile = this_tile<T::kRows>(a.p);
  __syncthreads();
  if (tile.last_row < tile.row) return;
  Forward<T>(a, tile, shared_address(dynamic_shared_memory())).run();
}

}  // namespace cuda
}  // namespace fastattn
