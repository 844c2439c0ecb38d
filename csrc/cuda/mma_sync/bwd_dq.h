// Gradient of the queries: one block of threads computes 64 to 128 rows of dq of one head, over the keys that they see.
//
// Each row's probabilities are computed anew from its lse; with dP = dout v^T, the gradient of a score is
// P * (dP - delta), and dq sums these times k. The products of dout and v start at -delta, which so costs nothing.
// Cost: 6 * head_dim flops and one exponential per score. Nothing but keys and values is read more than once, and no
// block writes what another one does: the result does not depend on the order in which blocks run.
#pragma once

#include "../common/arguments.h"
#include "../common/block_info.h"
#include "../common/mask.h"
#include "../common/online_softmax.h"
#include "../common/tile_copy.h"
#include "../smxx/bwd_preprocess.h"
#include "mma.h"

namespace fastattn {
namespace cuda {

template <class T>
class QueryGradient {
  using Number = typename T::Number;
  using Tile16 = float[T::kRowTiles][2][4];  // products of the warp's rows with 16 keys
  static constexpr int kChunk = 16;          // keys per step

 public:
  __device__ __forceinline__ QueryGradient(const Arguments& a, const Tile& tile, uint32_t shared)
      : a_(a),
        p_(a.p),
        tile_(tile),
        shared_(shared),
        stage_(T::kStageBytes),
        lane_(threadIdx.x % 32),
        warp_row_(threadIdx.x / 32 * T::kWarpRows),
        sees_(tile.sees),
        scores_(a, tile.b, tile.head, sees_.offset),
        key_(tile.first),
        copy_(p_, tile),
        offset_b_(lane_offset_b<T::kHeadDim>(lane_)),
        offset_a_(lane_offset_a<T::kHeadDim>(lane_)) {
    clear(acc_);
  }

  __device__ __forceinline__ void run() {
    load_rows(p_.dout, int(p_.head_dim_v), dout_);
    __syncthreads();  // all have their rows of dout; queries go to the same place
    load_rows(p_.q, int(p_.head_dim), q_);
    if (T::kQueriesAt < T::kStageBytes) __syncthreads();  // all have their queries; the first block goes there
    load_statistics();
    copy_.ask(shared_, tile_.end - key_);
    copy_.halfway(shared_, tile_.end - key_);
    while (key_ < tile_.end) {
      if (key_ >= tile_.whole_first)
        for (; key_ + T::kBlockN <= tile_.whole_end; key_ += T::kBlockN) {
          next_block();
          quick_block();
        }
      if (key_ >= tile_.end) break;
      next_block();
      careful_block();
      key_ += T::kBlockN;
    }
    store();
  }

 private:
  template <class Rows>
  __device__ __forceinline__ void load_rows(const View& view, int columns, Rows& rows) {
    using Copy = typename T::template Copy<T::kRows>;
    const uint32_t at = shared_ + T::kQueriesAt;
    Copy copy(view, tile_.b, tile_.head, tile_.sequence.q_begin + tile_.row, columns);
    copy.ask(at + Copy::offset(), tile_.last_row + 1 - tile_.row - Copy::row());
    copy.land(at + Copy::offset());
    __syncthreads();
    rows.load(at + warp_row_ * T::kHeadDim * 2, lane_);
  }

  __device__ __forceinline__ void load_statistics() {
    const int64_t batch = p_.cu_seqlens_q != nullptr ? 0 : tile_.b;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t at = statistic(p_, batch, tile_.head, tile_.sequence.q_begin + row_of(m, r));
        const bool exists = row_of(m, r) <= tile_.last_row;
        lse_[m][r] = exists ? a_.row_lse[at] : INFINITY;
        start_[m][2 * r] = exists ? a_.minus_delta[at] : 0.0f;
        // The same, by a way that the compiler cannot see through: a product starts with four registers, and would be
        // handed copies each time.
        start_[m][2 * r + 1] = __shfl_sync(kWholeWarp, start_[m][2 * r], lane_);
      }
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

  __device__ __forceinline__ int row_of(int m, int r) const {
    return tile_.row + warp_row_ + m * 16 + r * 8 + lane_ / 4;
  }

  // Key of an element of a product, from the product's first one on.
  __device__ __forceinline__ int column_of(int n, int e) const { return n * 8 + lane_ % 4 * 2 + e; }

  __device__ __forceinline__ void quick_block() {
    constexpr int kChunks = T::kBlockN / kChunk;
    unrolled<kChunks>(
        [&](auto c) { chunk<c * kChunk, false, c == (kChunks - 1) / 2>(key_ + c * kChunk, 0, false, false); });
  }

  __device__ __forceinline__ void careful_block() {
    const int warp_first = min(tile_.row + warp_row_, tile_.last_row);
    const int warp_last = min(tile_.row + warp_row_ + T::kWarpRows - 1, tile_.last_row);
    const int whole_first = sees_.first(warp_last), whole_last = sees_.last(warp_first);
    const int first = max(sees_.first(warp_first) - key_, 0) / kChunk;
    const int end = min((sees_.last(warp_last) - key_ + kChunk - 1) / kChunk, T::kBlockN / kChunk);
#pragma unroll 1
    for (int c = first; c < end; ++c) {
      const int key = key_ + c * kChunk;
      const bool left = key<whole_first, right = key + kChunk> whole_last;
      chunk<0, true, false>(key, c * kChunk * T::kHeadDim * 2, left, right);
    }
    copy_.halfway(next_stage(), rows_left());
  }

  // 16 keys, from row kRow of the block's tiles and `offset` bytes on. kHalfway: the copy comes halfway meanwhile.
  template <int kRow, bool kHides, bool kHalfway>
  __device__ __forceinline__ void chunk(int key, uint32_t offset, bool hides_left, bool hides_right) {
    const uint32_t keys = shared_ + stage_ + offset;
    Tile16 s, ds;
    multiply_transposed<Number, T::kHeadDim, kRow>(s, q_, keys + offset_b_);
    multiply_transposed<Number, T::kHeadDim, T::kBlockN + kRow>(  // values lie behind the keys
        ds, dout_, keys + offset_b_, [&](int m, int) -> const float (&)[4] { return start_[m]; });
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float change;
        const float p = scores_.probability(s[m][e / 4][e % 4], row_of(m, e % 4 / 2), key + column_of(e / 4, e % 2),
                                            lse_[m][e % 4 / 2], change);
        ds[m][e / 4][e % 4] *= p * change;
      }
    if constexpr (kHides) {
      const int column = key + column_of(0, 0);
      hide(
          ds, hides_left, hides_right,
          [&](int m, int r) { return sees_.first(min(row_of(m, r), tile_.last_row)) - column; },
          [&](int m, int r) { return sees_.last(min(row_of(m, r), tile_.last_row)) - column; }, 0.0f);
    }
    if constexpr (kHalfway) copy_.halfway(next_stage(), rows_left());
    uint32_t gradients[T::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) pack<Number>(gradients[m], ds[m]);
    multiply<Number, T::kHeadDim, kRow>(acc_, gradients, keys + offset_a_);
  }

  __device__ __forceinline__ void store() {
    copy_.land(next_stage());
    __syncthreads();  // all are done with the last block, where dq passes through
    store_products<Number, T::kHeadDim, T::kRowTiles>(p_.dq, tile_, tile_.sequence.q_begin, warp_row_, int(p_.head_dim),
                                                      acc_, static_cast<float>(p_.scale), lane_);
  }

  const Arguments& a_;
  const Params& p_;
  const Tile& tile_;
  uint32_t shared_, stage_;
  int lane_, warp_row_;
  const Visibility& sees_;
  int key_;  // where the current block begins
  Scores<T::kGeneral> scores_;
  KeyValueCopy<typename T::template Copy<T::kBlockN>> copy_;
  uint32_t offset_b_, offset_a_;
  typename T::Douts dout_;
  typename T::Queries q_;
  float lse_[T::kRowTiles][2];    // in units of log2
  float start_[T::kRowTiles][4];  // -delta, as products of dout and values start
  float acc_[T::kRowTiles][T::kHeadDim / 8][4];
};

template <class T>
__device__ __forceinline__ void gradient_of_queries(const Arguments& a) {
  __shared__ Tile tile;  // rarely needed, and registers are
  if (threadIdx.x == 0) tile = this_tile<T::kRows>(a.p);
  __syncthreads();
  if (tile.last_row < tile.row) return;
  QueryGradient<T>(a, tile, shared_address(dynamic_shared_memory())).run();
}

}  // namespace cuda
}  // namespace fastattn
