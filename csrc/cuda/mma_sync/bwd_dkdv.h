// Gradients of keys and values: one block of threads owns 64 to 128 keys of one head, and goes through the queries that
// see them, of each head of queries that shares it in turn.
//
// Products are transposed, keys by queries: so P^T and dS^T come out as the A operands of dv += P^T dout and
// dk += dS^T q, and no probability passes through shared memory. As in bwd_dq.h, the products of values
// and dout start at -delta. Cost: 8 * head_dim flops and one exponential per score. Above head_dim 128 the registers
// hold the sums of one gradient: the kernel is launched for each, at the cost of a fifth product.
#pragma once

#include "../common/arguments.h"
#include "../common/block_info.h"
#include "../common/mask.h"
#include "../common/tile_copy.h"
#include "mma.h"
#include "query_copy.h"

namespace fastattn {
namespace cuda {

// Which gradients a kernel computes.
enum class Of { kBoth, kKeys, kValues };

template <class T>
class KeyGradient {
  using Number = typename T::Number;
  using Tile16 = float[T::kRowTiles][2][4];  // products of the warp's keys with 16 queries
  static constexpr int kChunk = 16;          // queries per step

 public:
  __device__ __forceinline__ KeyGradient(const Arguments& a, const Tile& tile, uint32_t shared)
      : p_(a.p),
        tile_(tile),
        shared_(shared),
        stage_(0),
        lane_(threadIdx.x % 32),
        warp_row_(threadIdx.x / 32 * T::kWarpRows),
        sees_(tile.sees),
        a_(a),
        copy_(a, tile),
        offset_b_(lane_offset_b<T::kHeadDim>(lane_)),
        offset_a_(lane_offset_a<T::kHeadDim>(lane_)) {
    if (T::kOfKeys) clear(dk_);
    if (T::kOfValues) clear(dv_);
  }

  __device__ __forceinline__ void run() {
    load_keys_and_values();
    if (tile_.first < tile_.end) {
      rows_left_ = rows_from(tile_.first);
      copy_.ask(shared_, rows_left_);
      copy_.halfway(shared_, rows_left_);
      for (int head = 0; head < tile_.group; ++head) {
        const Scores<T::kGeneral> scores(a_, tile_.b, tile_.head * tile_.group + head, sees_.offset);
        int query = tile_.first;
        while (query < tile_.end) {
          if (query >= tile_.whole_first)
            for (; query + T::kBlockM <= tile_.whole_end; query += T::kBlockM) {
              next_block(query, head);
              quick_block(scores, query);
            }
          if (query >= tile_.end) break;
          next_block(query, head);
          careful_block(scores, query);
          query += T::kBlockM;
        }
      }
    }
    __syncthreads();  // all are done with what lay where the gradients pass through
    if (T::kOfKeys) store(dk_, p_.dk, int(p_.head_dim), static_cast<float>(p_.scale));
    if (T::kOfKeys && T::kOfValues) __syncwarp();  // a warp's rows pass through a place of its own
    if (T::kOfValues) store(dv_, p_.dv, int(p_.head_dim_v), 1.0f);
  }

 private:
  // Where keys and values overlap, the values wait for all to have their keys; so does the first block of queries.
  __device__ __forceinline__ void load_keys_and_values() {
    constexpr int kRowBytes = T::kRows * T::kHeadDim * 2;
    constexpr bool kApart = T::kKeysAt + kRowBytes <= T::kValuesAt || T::kValuesAt + kRowBytes <= T::kKeysAt;
    constexpr int kLastAt = T::kOfKeys ? T::kValuesAt : T::kKeysAt;
    load_rows(p_.k, int(p_.head_dim), keys_, T::kKeysAt);
    if (T::kOfKeys && !kApart) __syncthreads();
    if (T::kOfKeys) load_rows(p_.v, int(p_.head_dim_v), values_, T::kValuesAt);
    if (kLastAt < T::kStageBytes) __syncthreads();
  }

  template <class Rows>
  __device__ __forceinline__ void load_rows(const View& view, int columns, Rows& rows, uint32_t to) {
    using Copy = typename T::template Copy<T::kRows>;
    const uint32_t at = shared_ + to;
    Copy copy(view, tile_.b, tile_.head, tile_.sequence.k_begin + tile_.row, columns);
    copy.ask(at + Copy::offset(), tile_.last_row + 1 - tile_.row - Copy::row());
    copy.land(at + Copy::offset());
    __syncthreads();
    rows.load(at + warp_row_ * T::kHeadDim * 2, lane_);
  }

  __device__ __forceinline__ int rows_from(int query) const {
    return static_cast<int>(tile_.sequence.q_length) - query;
  }

  // Turns to the block that starts at `query`, and asks for the one after it, which may be the next head's first.
  __device__ __forceinline__ void next_block(int query, int head) {
    copy_.land(shared_ + stage_);
    __syncthreads();  // the block has arrived for all, and all are done with the one before
    stage_ ^= T::kStageBytes;
    int next = query + T::kBlockM;
    if (next >= tile_.end) {
      rows_left_ = 0;
      if (head + 1 == tile_.group) return;
      copy_.next_head();
      next = tile_.first;
    }
    rows_left_ = rows_from(next);
    copy_.ask(shared_ + stage_, rows_left_);
  }

  // Key of this lane's row r of 16-row tile m.
  __device__ __forceinline__ int row_of(int m, int r) const {
    return tile_.row + warp_row_ + m * 16 + r * 8 + lane_ / 4;
  }

  // Query of an element of a product, from the product's first one on.
  __device__ __forceinline__ int column_of(int n, int e) const { return n * 8 + lane_ % 4 * 2 + e; }

  __device__ __forceinline__ void quick_block(const Scores<T::kGeneral>& scores, int query) {
    constexpr int kChunks = T::kBlockM / kChunk;
    unrolled<kChunks>(
        [&](auto c) { chunk<c * kChunk, false, c == (kChunks - 1) / 2>(scores, query + c * kChunk, 0, false, false); });
  }

  __device__ __forceinline__ void careful_block(const Scores<T::kGeneral>& scores, int query) {
    const int q_length = static_cast<int>(tile_.sequence.q_length);
    const int warp_first = min(tile_.row + warp_row_, tile_.last_row);
    const int warp_last = min(tile_.row + warp_row_ + T::kWarpRows - 1, tile_.last_row);
    const int whole_first = sees_.first_query(warp_last), whole_end = sees_.last_query(warp_first, q_length);
    const int first = max(sees_.first_query(warp_first) - query, 0) / kChunk;
    const int end = min((sees_.last_query(warp_last, q_length) - query + kChunk - 1) / kChunk, T::kBlockM / kChunk);
#pragma unroll 1
    for (int c = first; c < end; ++c) {
      const int at = query + c * kChunk;
      const bool left = at<whole_first, right = at + kChunk> whole_end;
      chunk<0, true, false>(scores, at, c * kChunk, left, right);
    }
    copy_.halfway(shared_ + stage_, rows_left_);
  }

  // 16 queries, from row kRow + row of the block's tiles on. kHalfway: the copy comes halfway meanwhile.
  template <int kRow, bool kHides, bool kHalfway>
  __device__ __forceinline__ void chunk(const Scores<T::kGeneral>& scores, int query, int row, bool hides_left,
                                        bool hides_right) {
    constexpr int kDout = T::kBlockM + kRow;  // dout lies behind the queries
    const uint32_t stage = shared_ + (stage_ ^ T::kStageBytes), queries = stage + row * T::kHeadDim * 2;
    const auto hide_unseen = [&](Tile16& x) {
      const int column = query + column_of(0, 0), q_length = static_cast<int>(tile_.sequence.q_length);
      hide(
          x, hides_left, hides_right,
          [&](int m, int r) { return sees_.first_query(min(row_of(m, r), tile_.last_row)) - column; },
          [&](int m, int r) { return sees_.last_query(min(row_of(m, r), tile_.last_row), q_length) - column; }, 0.0f);
    };
    const char* statistics = dynamic_shared_memory() + (stage - shared_) + 2 * T::kTileBytes + 8 * (kRow + row);
    Tile16 s, change;
    multiply_transposed<Number, T::kHeadDim, kRow>(s, keys_, queries + offset_b_);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 lse = *reinterpret_cast<const float2*>(statistics + 8 * column_of(n, 0));
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          s[m][n][e] = scores.probability(s[m][n][e], query + column_of(n, e % 2), row_of(m, e / 2),
                                          e % 2 == 0 ? lse.x : lse.y, change[m][n][e]);
    }
    if constexpr (kHides) hide_unseen(s);
    uint32_t packed[T::kRowTiles][4];
    if constexpr (T::kOfValues) {
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) pack<Number>(packed[m], s[m]);
      multiply<Number, T::kHeadDim, kDout>(dv_, packed, queries + offset_a_);
    }
    if constexpr (kHalfway) copy_.halfway(shared_ + stage_, rows_left_);
    if constexpr (T::kOfKeys) {
      float start[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n)
        *reinterpret_cast<float4*>(start[n]) =
            *reinterpret_cast<const float4*>(statistics + T::kStatisticBytes + 8 * column_of(n, 0));
      Tile16 ds;
      multiply_transposed<Number, T::kHeadDim, kDout>(ds, values_, queries + offset_b_,
                                                      [&](int, int n) -> const float (&)[4] { return start[n]; });
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int e = 0; e < 8; ++e) ds[m][e / 4][e % 4] *= s[m][e / 4][e % 4] * change[m][e / 4][e % 4];
      if constexpr (kHides) hide_unseen(ds);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) pack<Number>(packed[m], ds[m]);
      multiply<Number, T::kHeadDim, kRow>(dk_, packed, queries + offset_a_);
    }
  }

  __device__ __forceinline__ void store(const float (&acc)[T::kRowTiles][T::kHeadDim / 8][4], const View& to,
                                        int columns, float factor) {
    if (to.data == nullptr) return;
    // Not by store_products, with which ptxas spills for compute capability 12.0.
    char* rows = dynamic_shared_memory() + warp_row_ * T::kHeadDim * 2;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) put_row<Number, T::kHeadDim>(rows, m, r, acc[m], factor, lane_);
    __syncwarp();
    store_rows<T::kWarpRows, T::kHeadDim>(to, tile_.b, tile_.head, tile_.sequence.k_begin + tile_.row + warp_row_,
                                          tile_.last_row + 1 - tile_.row - warp_row_, columns, rows, lane_);
  }

  const Params& p_;
  const Tile& tile_;
  uint32_t shared_, stage_;  // stage_: where the next block goes
  int lane_, warp_row_;
  const Visibility& sees_;
  const Arguments& a_;
  QueryCopy<T> copy_;
  uint32_t offset_b_, offset_a_;
  int rows_left_;  // queries of the block asked for that exist, from its first one on
  typename T::Keys keys_;
  typename T::Values values_;
  float dk_[T::kRowTiles][T::kHeadDim / 8][4], dv_[T::kRowTiles][T::kHeadDim / 8][4];
};

template <class T>
__device__ __forceinline__ void gradient_of_keys(const Arguments& a) {
  __shared__ Tile tile;  // rarely needed, and registers are
  if (threadIdx.x == 0) tile = this_tile<T::kRows, true>(a.p);
  __syncthreads();
  if (tile.last_row < tile.row) return;
  KeyGradient<T>(a, tile, shared_address(dynamic_shared_memory())).run();
}

}  // namespace cuda
}  // namespace fastattn
