// dK and dV: one block of threads owns 64 to 128 keys of one head, and goes through the queries that see them, of each
// query head that shares the key/value head in turn.
//
// Products are transposed, keys by queries. So P^T and dS^T come out as the A operands of dv += P^T dout and
// dk += dS^T q, and no probability passes through shared memory. As in bwd_dq.h, the products of values and dout start
// at -delta. Cost: 8 * head_dim flops and one exponential per score. Where the registers hold the sums of one gradient
// only, the kernel is launched for each, at the cost of a fifth product.
#pragma once

#include "../common/arguments.h"
#include "../common/block_info.h"
#include "../common/score_mod.h"
#include "epilogue.h"
#include "mma.h"
#include "query_copy.h"

namespace fastattn {
namespace cuda {

// Which gradients a kernel computes.
enum class Grads { kDkDv, kDk, kDv };

template <class T>
class BwdDkdv {
  using Element = typename T::Element;
  using Tile16 = float[T::kRowTiles][2][4];  // products of the warp's keys with 16 queries
  static constexpr int kStep = Mask::kStep;

 public:
  __device__ __forceinline__ BwdDkdv(const Arguments& a, const BlockInfo& info, uint32_t shared)
      : p_(a.p),
        info_(info),
        shared_(shared),
        stage_(0),
        lane_(threadIdx.x % 32),
        warp_row_(threadIdx.x / 32 * T::kWarpRows),
        mask_(info.mask),
        a_(a),
        copy_(a, info),
        offset_b_(lane_offset_b<T::kHeadDim>(lane_)),
        offset_a_(lane_offset_a<T::kHeadDim>(lane_)) {
    if (T::kHasDk) clear(dk_);
    if (T::kHasDv) clear(dv_);
  }

  __device__ __forceinline__ void run() {
    load_keys_and_values();
    if (info_.columns.n_begin < info_.columns.n_end) {
      rows_left_ = rows_from(info_.columns.n_begin);
      copy_.issue(shared_, rows_left_);
      copy_.advance(shared_, rows_left_);
      for (int head = 0; head < info_.group; ++head) {
        const ScoreMod<T::kHasScoreMod> score_mod(a_, info_.b, info_.head * info_.group + head, mask_.diagonal_offset);
        int query = info_.columns.n_begin;
        while (query < info_.columns.n_end) {
          if (query >= info_.columns.full_begin)
            for (; query + T::kBlockM <= info_.columns.full_end; query += T::kBlockM) {
              next_block(query, head);
              full_block(score_mod, query);
            }
          if (query >= info_.columns.n_end) break;
          next_block(query, head);
          masked_block(score_mod, query);
          query += T::kBlockM;
        }
      }
    }
    __syncthreads();  // all are done with what was where the gradients pass through
    if (T::kHasDk) store(dk_, p_.dk, int(p_.head_dim), static_cast<float>(p_.scale));
    if (T::kHasDk && T::kHasDv) __syncwarp();  // a warp's rows pass through a place of its own
    if (T::kHasDv) store(dv_, p_.dv, int(p_.head_dim_v), 1.0f);
  }

 private:
  // Where keys and values overlap, the values wait for all to have their keys; so does the first block of queries.
  __device__ __forceinline__ void load_keys_and_values() {
    constexpr int kRowBytes = T::kBlockN * T::kHeadDim * 2;
    constexpr bool kApart = T::kKeysAt + kRowBytes <= T::kValuesAt || T::kValuesAt + kRowBytes <= T::kKeysAt;
    constexpr int kLastAt = T::kHasDk ? T::kValuesAt : T::kKeysAt;
    load_rows(p_.k, int(p_.head_dim), k_, T::kKeysAt);
    if (T::kHasDk && !kApart) __syncthreads();
    if (T::kHasDk) load_rows(p_.v, int(p_.head_dim_v), v_, T::kValuesAt);
    if (kLastAt < T::kStageBytes) __syncthreads();
  }

  template <class AOperand>
  __device__ __forceinline__ void load_rows(const View& view, int columns, AOperand& operand, uint32_t to) {
    using Copy = typename T::template Copy<T::kBlockN>;
    const uint32_t at = shared_ + to;
    Copy copy(view, info_.b, info_.head, info_.sequence.k_begin + info_.first_row, columns);
    copy.issue(at + Copy::offset(), info_.last_row + 1 - info_.first_row - Copy::row());
    copy.wait(at + Copy::offset());
    __syncthreads();
    operand.load(at + warp_row_ * T::kHeadDim * 2, lane_);
  }

  __device__ __forceinline__ int seqlen_q() const { return static_cast<int>(info_.sequence.q_length); }
  __device__ __forceinline__ int rows_from(int query) const { return seqlen_q() - query; }

  // Turns to the block that starts at `query`, and issues the one after it, which may be the next head's first.
  __device__ __forceinline__ void next_block(int query, int head) {
    copy_.wait(shared_ + stage_);
    __syncthreads();  // the block has arrived for all, and all are done with the one before
    stage_ ^= T::kStageBytes;
    int next = query + T::kBlockM;
    if (next >= info_.columns.n_end) {
      rows_left_ = 0;
      if (head + 1 == info_.group) return;
      copy_.next_head();
      next = info_.columns.n_begin;
    }
    rows_left_ = rows_from(next);
    copy_.issue(shared_ + stage_, rows_left_);
  }

  // Key of this lane's row r of 16-row tile m.
  __device__ __forceinline__ int row_of(int m, int r) const {
    return info_.first_row + warp_row_ + m * 16 + r * 8 + lane_ / 4;
  }

  // Query of an element of a product, from the product's first one on.
  __device__ __forceinline__ int column_of(int n, int e) const { return n * 8 + lane_ % 4 * 2 + e; }

  __device__ __forceinline__ void full_block(const ScoreMod<T::kHasScoreMod>& score_mod, int query) {
    constexpr int kSteps = T::kBlockM / kStep;
    static_for<kSteps>([&](auto c) {
      step<c * kStep, false, c == (kSteps - 1) / 2>(score_mod, query + c * kStep, 0, {false, false});
    });
  }

  __device__ __forceinline__ void masked_block(const ScoreMod<T::kHasScoreMod>& score_mod, int query) {
    const int q_length = seqlen_q();
    const int warp_first = min(info_.first_row + warp_row_, info_.last_row);
    const int warp_last = min(info_.first_row + warp_row_ + T::kWarpRows - 1, info_.last_row);
    const MaskedSteps steps = mask_.steps<Rows::kKeys, T::kBlockM>(warp_first, warp_last, query, q_length);
#pragma unroll 1
    for (int c = steps.begin; c < steps.end; ++c) {
      const int at = query + c * kStep;
      step<0, true, false>(score_mod, at, c * kStep, Mask::sides(steps, at));
    }
    copy_.advance(shared_ + stage_, rows_left_);
  }

  // 16 queries, from row kRow + row of the block's tiles on. kAdvances: the copy is advanced meanwhile.
  template <int kRow, bool kMasked, bool kAdvances>
  __device__ __forceinline__ void step(const ScoreMod<T::kHasScoreMod>& score_mod, int query, int row, Sides sides) {
    constexpr int kDout = T::kBlockM + kRow;  // dout comes after the queries
    const uint32_t stage = shared_ + (stage_ ^ T::kStageBytes), queries = stage + row * T::kHeadDim * 2;
    const auto hide = [&](Tile16& x) {
      const int column = query + column_of(0, 0), q_length = seqlen_q();
      const auto row_in_block = [&](int m, int r) { return min(row_of(m, r), info_.last_row); };
      mask_.hide<Rows::kKeys>(x, sides, row_in_block, column, q_length, 0.0f);
    };
    const char* row_values = dynamic_shared_memory() + (stage - shared_) + 2 * T::kTileBytes + 8 * (kRow + row);
    Tile16 s, change;
    multiply_transposed<Element, T::kHeadDim, kRow>(s, k_, queries + offset_b_);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 lse = *reinterpret_cast<const float2*>(row_values + 8 * column_of(n, 0));
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          s[m][n][e] = score_mod.probability(s[m][n][e], query + column_of(n, e % 2), row_of(m, e / 2),
                                             e % 2 == 0 ? lse.x : lse.y, change[m][n][e]);
    }
    if constexpr (kMasked) hide(s);
    uint32_t packed[T::kRowTiles][4];
    if constexpr (T::kHasDv) {
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) pack<Element>(packed[m], s[m]);
      multiply<Element, T::kHeadDim, kDout>(dv_, packed, queries + offset_a_);
    }
    if constexpr (kAdvances) copy_.advance(shared_ + stage_, rows_left_);
    if constexpr (T::kHasDk) {
      float start[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n)
        *reinterpret_cast<float4*>(start[n]) =
            *reinterpret_cast<const float4*>(row_values + T::kRowValueBytes + 8 * column_of(n, 0));
      Tile16 ds;
      multiply_transposed<Element, T::kHeadDim, kDout>(ds, v_, queries + offset_b_,
                                                       [&](int, int n) -> const float (&)[4] { return start[n]; });
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int e = 0; e < 8; ++e) ds[m][e / 4][e % 4] *= s[m][e / 4][e % 4] * change[m][e / 4][e % 4];
      if constexpr (kMasked) hide(ds);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) pack<Element>(packed[m], ds[m]);
      multiply<Element, T::kHeadDim, kRow>(dk_, packed, queries + offset_a_);
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
      for (int r = 0; r < 2; ++r) put_row<Element, T::kHeadDim>(rows, m, r, acc[m], factor, lane_);
    __syncwarp();
    store_rows<T::kWarpRows, T::kHeadDim>(to, info_.b, info_.head, info_.sequence.k_begin + info_.first_row + warp_row_,
                                          info_.last_row + 1 - info_.first_row - warp_row_, columns, rows, lane_);
  }

  const Params& p_;
  const BlockInfo& info_;
  uint32_t shared_, stage_;  // stage_: where the next block goes
  int lane_, warp_row_;
  const Mask& mask_;
  const Arguments& a_;
  QueryCopy<T> copy_;
  uint32_t offset_b_, offset_a_;
  int rows_left_;  // queries of the issued block that exist, from its first one on
  typename T::KOperand k_;
  typename T::VOperand v_;
  float dk_[T::kRowTiles][T::kHeadDim / 8][4], dv_[T::kRowTiles][T::kHeadDim / 8][4];
};

template <class T>
__device__ __forceinline__ void bwd_dkdv(const Arguments& a) {
  __shared__ BlockInfo info;  // rarely needed, and registers are
  if (threadIdx.x == 0) info = block_info<T::kBlockN, Rows::kKeys>(a.p);
  __syncthreads();
  if (info.last_row < info.first_row) return;
  BwdDkdv<T>(a, info, shared_address(dynamic_shared_memory())).run();
}

}  // namespace cuda
}  // namespace fastattn
