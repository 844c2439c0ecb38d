// dQ: one block of threads computes 64 to 128 rows of dq of one head, over the keys that they see.
//
// The probabilities of a row are computed again from its lse. With dP = dout v^T, the gradient of a score is
// P * (dP - delta), and dq sums these times k. The products of dout and v start at -delta, which so costs nothing.
// Cost: 6 * head_dim flops and one exponential per score. Only keys and values are read more than once. No block writes
// what another one does: the result does not depend on the order in which blocks run.
#pragma once

#include "../common/arguments.h"
#include "../common/block_info.h"
#include "../common/online_softmax.h"
#include "../smxx/bwd_preprocess.h"
#include "epilogue.h"
#include "kv_copy.h"
#include "mma.h"

namespace fastattn {
namespace cuda {

template <class T>
class BwdDq {
  using Element = typename T::Element;
  using Tile16 = float[T::kRowTiles][2][4];  // products of the warp's rows with 16 keys
  static constexpr int kStep = Mask::kStep;

 public:
  __device__ __forceinline__ BwdDq(const Arguments& a, const BlockInfo& info, uint32_t shared)
      : a_(a),
        p_(a.p),
        info_(info),
        shared_(shared),
        stage_(T::kStageBytes),
        lane_(threadIdx.x % 32),
        warp_row_(threadIdx.x / 32 * T::kWarpRows),
        mask_(info.mask),
        score_mod_(a, info.b, info.head, mask_.diagonal_offset),
        key_(info.columns.n_begin),
        copy_(p_, info),
        offset_b_(lane_offset_b<T::kHeadDim>(lane_)),
        offset_a_(lane_offset_a<T::kHeadDim>(lane_)) {
    clear(acc_);
  }

  __device__ __forceinline__ void run() {
    load_rows(p_.dout, int(p_.head_dim_v), dout_);
    __syncthreads();  // all have their rows of dout; queries go to the same place
    load_rows(p_.q, int(p_.head_dim), q_);
    if (T::kQueriesAt < T::kStageBytes) __syncthreads();  // all have their queries; the first block goes there
    load_lse_and_delta();
    copy_.issue(shared_, info_.columns.n_end - key_);
    copy_.advance(shared_, info_.columns.n_end - key_);
    while (key_ < info_.columns.n_end) {
      if (key_ >= info_.columns.full_begin)
        for (; key_ + T::kBlockN <= info_.columns.full_end; key_ += T::kBlockN) {
          next_block();
          full_block();
        }
      if (key_ >= info_.columns.n_end) break;
      next_block();
      masked_block();
      key_ += T::kBlockN;
    }
    store();
  }

 private:
  template <class AOperand>
  __device__ __forceinline__ void load_rows(const View& view, int columns, AOperand& operand) {
    using Copy = typename T::template Copy<T::kBlockM>;
    const uint32_t at = shared_ + T::kQueriesAt;
    Copy copy(view, info_.b, info_.head, info_.sequence.q_begin + info_.first_row, columns);
    copy.issue(at + Copy::offset(), info_.last_row + 1 - info_.first_row - Copy::row());
    copy.wait(at + Copy::offset());
    __syncthreads();
    operand.load(at + warp_row_ * T::kHeadDim * 2, lane_);
  }

  __device__ __forceinline__ void load_lse_and_delta() {
    const int64_t batch = p_.cu_seqlens_q != nullptr ? 0 : info_.b;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t at = row_index(p_, batch, info_.head, info_.sequence.q_begin + row_of(m, r));
        const bool exists = row_of(m, r) <= info_.last_row;
        lse_[m][r] = exists ? a_.lse_log2[at] : INFINITY;
        start_[m][2 * r] = exists ? a_.neg_delta[at] : 0.0f;
        // The same, in a way that the compiler cannot see through. A product starts with four registers, and would be
        // handed copies each time.
        start_[m][2 * r + 1] = __shfl_sync(kWholeWarp, start_[m][2 * r], lane_);
      }
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

  __device__ __forceinline__ int seqlen_q() const { return static_cast<int>(info_.sequence.q_length); }

  __device__ __forceinline__ int row_of(int m, int r) const {
    return info_.first_row + warp_row_ + m * 16 + r * 8 + lane_ / 4;
  }

  // Key of an element of a product, from the product's first one on.
  __device__ __forceinline__ int column_of(int n, int e) const { return n * 8 + lane_ % 4 * 2 + e; }

  __device__ __forceinline__ void full_block() {
    constexpr int kSteps = T::kBlockN / kStep;
    static_for<kSteps>(
        [&](auto c) { step<c * kStep, false, c == (kSteps - 1) / 2>(key_ + c * kStep, 0, {false, false}); });
  }

  __device__ __forceinline__ void masked_block() {
    const int warp_first = min(info_.first_row + warp_row_, info_.last_row);
    const int warp_last = min(info_.first_row + warp_row_ + T::kWarpRows - 1, info_.last_row);
    const MaskedSteps steps = mask_.steps<Rows::kQueries, T::kBlockN>(warp_first, warp_last, key_, seqlen_q());
#pragma unroll 1
    for (int c = steps.begin; c < steps.end; ++c) {
      const int key = key_ + c * kStep;
      step<0, true, false>(key, c * kStep * T::kHeadDim * 2, Mask::sides(steps, key));
    }
    copy_.advance(next_stage(), rows_left());
  }

  // 16 keys, from row kRow of the block's tiles and `offset` bytes on. kAdvances: the copy is advanced meanwhile.
  template <int kRow, bool kMasked, bool kAdvances>
  __device__ __forceinline__ void step(int key, uint32_t offset, Sides sides) {
    const uint32_t keys = shared_ + stage_ + offset;
    Tile16 s, ds;
    multiply_transposed<Element, T::kHeadDim, kRow>(s, q_, keys + offset_b_);
    multiply_transposed<Element, T::kHeadDim, T::kBlockN + kRow>(  // values come after the keys
        ds, dout_, keys + offset_b_, [&](int m, int) -> const float (&)[4] { return start_[m]; });
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float change;
        const float p = score_mod_.probability(s[m][e / 4][e % 4], row_of(m, e % 4 / 2), key + column_of(e / 4, e % 2),
                                               lse_[m][e % 4 / 2], change);
        ds[m][e / 4][e % 4] *= p * change;
      }
    if constexpr (kMasked) {
      const auto row = [&](int m, int r) { return min(row_of(m, r), info_.last_row); };
      mask_.hide<Rows::kQueries>(ds, sides, row, key + column_of(0, 0), seqlen_q(), 0.0f);
    }
    if constexpr (kAdvances) copy_.advance(next_stage(), rows_left());
    uint32_t packed[T::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) pack<Element>(packed[m], ds[m]);
    multiply<Element, T::kHeadDim, kRow>(acc_, packed, keys + offset_a_);
  }

  __device__ __forceinline__ void store() {
    copy_.wait(next_stage());
    __syncthreads();  // all are done with the last block; dq passes through its place
    store_products<Element, T::kHeadDim, T::kRowTiles>(p_.dq, info_, info_.sequence.q_begin, warp_row_,
                                                       int(p_.head_dim), acc_, static_cast<float>(p_.scale), lane_);
  }

  const Arguments& a_;
  const Params& p_;
  const BlockInfo& info_;
  uint32_t shared_, stage_;
  int lane_, warp_row_;
  const Mask& mask_;
  int key_;  // where the current block begins
  ScoreMod<T::kHasScoreMod> score_mod_;
  KeyValueCopy<typename T::template Copy<T::kBlockN>> copy_;
  uint32_t offset_b_, offset_a_;
  typename T::DoutOperand dout_;
  typename T::QOperand q_;
  float lse_[T::kRowTiles][2];    // in units of log2
  float start_[T::kRowTiles][4];  // -delta, as products of dout and values start
  float acc_[T::kRowTiles][T::kHeadDim / 8][4];
};

template <class T>
__device__ __forceinline__ void bwd_dq(const Arguments& a) {
  __shared__ BlockInfo info;  // rarely needed, and registers are
  if (threadIdx.x == 0) info = block_info<T::kBlockM, Rows::kQueries>(a.p);
  __syncthreads();
  if (info.last_row < info.first_row) return;
  BwdDq<T>(a, info, shared_address(dynamic_shared_memory())).run();
}

}  // namespace cuda
}  // namespace fastattn
