// Attention of few queries over a cache: one block of threads computes 16 rows, the queries of all heads that share a
// key/value head, over one split of the keys.
//
// Cost: 4 * head_dim flops per score, 16 scores for the 4 * head_dim bytes of a key and its value, which are read once:
// memory bounds it by far, so what counts is how many bytes are under way. Each warp has its own pieces of 16 keys in a
// ring of its own, and waits for nobody until the end, when the warps of the block are merged, in their order. Of the
// ring's stages all but one are under way at any time, 32 to 72 KiB for the block; together they stay within what every
// GPU of compute capability 8.0 and up gives a block.
#pragma once

#include "../common/arguments.h"
#include "../common/combine_state.h"
#include "../common/element.h"
#include "../common/online_softmax.h"
#include "../common/packed_block_info.h"
#include "../mma_sync/mma.h"
#include "cache_copy.h"

namespace fastattn {
namespace cuda {
namespace sm80 {

template <class Number_, int kHeadDim_, bool kGeneral_>
struct DecodeTraits {
  using Number = Number_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kRows = 16;
  static constexpr int kWarps = kHeadDim <= 128 ? 4 : 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = kHeadDim == 32 ? 5 : kHeadDim == 192 ? 4 : 3;
  static constexpr int kTileBytes = kPiece * kHeadDim * 2;  // of K or V
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kWarps * kRingBytes;
  static_assert(kSharedBytes <= 96 * 1024, "more than some GPUs have");
};

template <class T>
class Decode {
  using Number = typename T::Number;
  using Pieces = CachePieces<T::kHeadDim>;
  using Tile16 = float[1][2][4];  // products of the 16 rows with 16 keys
  using ScoresOfRow = Scores<T::kGeneral>;

  // What a warp hands on, in its ring: 16 rows of sums, padded so that rows lie in different banks, and their states.
  static constexpr int kSumsStride = T::kHeadDim + 8;
  struct Handed {
    float sums[T::kRows][kSumsStride];
    float reference[T::kRows], sum[T::kRows];
  };
  static_assert(sizeof(Handed) <= T::kRingBytes, "fits where the keys were");

 public:
  // Pieces [first_piece, end_piece) of the keys.
  __device__ __forceinline__ Decode(const Arguments& a, const PackedTile& tile, int first_piece, int end_piece)
      : a_(a),
        p_(a.p),
        tile_(tile),
        lane_(threadIdx.x % 32),
        piece_(first_piece + warp()),
        end_piece_(end_piece),
        queries_{tile.query(row_of(0)), tile.query(row_of(1))},
        scores_{ScoresOfRow(a, tile.b, tile.head(row_of(0)), tile.sees.offset),
                ScoresOfRow(a, tile.b, tile.head(row_of(1)), tile.sees.offset)},
        pieces_(p_, tile, piece_, end_piece, T::kWarps),
        ring_(shared_address(handed(warp()))),
        offset_to_(Pieces::lane_offset()),
        offset_k_(lane_offset_b<T::kHeadDim>(lane_)),
        offset_v_(lane_offset_a<T::kHeadDim>(lane_)) {
    clear(acc_);
  }

  __device__ __forceinline__ void run() {
    for (int s = 0; s + 1 < T::kStages; ++s) pieces_.next(ring_ + s * T::kStageBytes + offset_to_);
    load_queries();
    for (; piece_ < end_piece_; piece_ += T::kWarps) {
      ptx::cp_async_wait_group<T::kStages - 2>();
      __syncwarp();  // the piece has arrived for all lanes, and all are done with the one before, where the next goes
      pieces_.next(ring_ + (stage_ == 0 ? T::kStages - 1 : stage_ - 1) * T::kStageBytes + offset_to_);
      attend(ring_ + stage_ * T::kStageBytes);
      stage_ = stage_ + 1 == T::kStages ? 0 : stage_ + 1;
    }
    hand_on();
    __syncthreads();
    store();
  }

 private:
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ Handed* handed(int warp) {
    extern __shared__ __align__(128) char memory[];
    return reinterpret_cast<Handed*>(memory + warp * T::kRingBytes);
  }

  // This lane's rows, r = 0 and 1.
  __device__ __forceinline__ int row_of(int r) const { return tile_.row + lane_ / 4 + r * 8; }

  // The key of an element of a product, from the product's first one on.
  __device__ __forceinline__ int column_of(int e) const { return e / 4 * 8 + lane_ % 4 * 2 + e % 2; }

  // The queries as A operands, straight from memory; rows and columns that do not exist are 0.
  __device__ __forceinline__ void load_queries() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t at =
          tile_.b * p_.q.stride_b + tile_.head(row_of(r)) * p_.q.stride_h + queries_[r] * p_.q.stride_s + lane_ % 4 * 2;
      const uint16_t* from = static_cast<const uint16_t*>(p_.q.data) + at;
      const int columns = tile_.exists(row_of(r)) ? static_cast<int>(p_.head_dim) : 0;
#pragma unroll
      for (int c = 0; c < T::kHeadDim; c += 8)
        q_.kept[0][c / 16].r[r + c % 16 / 4] = c < columns ? *reinterpret_cast<const uint32_t*>(from + c) : 0;
    }
  }

  // 16 keys and values at `tile`.
  __device__ __forceinline__ void attend(uint32_t tile) {
    Tile16 s, probs;
    multiply_transposed<Number, T::kHeadDim>(s, q_, tile + offset_k_);
    scores(s);
    float sums[1][2];
    probabilities(s, probs, sums);
    if (!ready_ || !softmax_.fits(sums, Number::kLargestSum)) {
      softmax_.renew(s, acc_);
      ready_ = softmax_.ready();
      probabilities(s, probs, sums);
    }
    softmax_.add(sums);
    uint32_t packed[1][4];
    pack<Number>(packed[0], probs[0]);
    multiply<Number, T::kHeadDim>(acc_, packed, tile + T::kTileBytes + offset_v_);
  }

  // Products to scores, -inf for keys that a row does not see.
  __device__ __forceinline__ void scores(Tile16& s) const {
    const int key = piece_ * kPiece;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int r = e % 4 / 2;
      s[0][e / 4][e % 4] = scores_[r](s[0][e / 4][e % 4], queries_[r], key + column_of(e));
    }
    if (key >= tile_.whole_first && key + kPiece <= tile_.whole_last) return;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int query = queries_[e % 4 / 2], j = key + column_of(e);
      if (j < tile_.sees.first(query) || j >= tile_.sees.last(query)) s[0][e / 4][e % 4] = -INFINITY;
    }
  }

  __device__ __forceinline__ void probabilities(const Tile16& s, Tile16& probs, float (&sums)[1][2]) const {
#pragma unroll
    for (int e = 0; e < 8; ++e) probs[0][e / 4][e % 4] = s[0][e / 4][e % 4];
    softmax_.probabilities(probs);
    sums[0][0] = sums[0][1] = 0.0f;
    softmax_.sum_up(sums, probs);
  }

  __device__ __forceinline__ void hand_on() {
    __syncwarp();  // all lanes are done with the last piece, and all copies have been waited for
    Handed& to = *handed(warp());
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane_ / 4 + r * 8;
      const float sum = quad_sum(softmax_.sum[0][r]);
      if (lane_ % 4 == 0) to.reference[row] = softmax_.reference[0][r], to.sum[row] = sum;
#pragma unroll
      for (int n = 0; n < T::kHeadDim / 8; ++n)
        *reinterpret_cast<float2*>(&to.sums[row][n * 8 + lane_ % 4 * 2]) = {acc_[0][n][2 * r], acc_[0][n][2 * r + 1]};
    }
  }

  // Merges the warps: 4 numbers of a row per thread and step.
  __device__ __forceinline__ void store() const {
    constexpr int kSteps = T::kHeadDim / 4;
    for (int e = threadIdx.x; e < T::kRows * kSteps; e += T::kThreads) {
      const int row = e / kSteps, column = e % kSteps * 4;
      if (!tile_.exists(tile_.row + row)) continue;
      Merge merge;
#pragma unroll
      for (int w = 0; w < T::kWarps; ++w) merge.see(handed(w)->reference[row]);
      float4 x = {};
#pragma unroll
      for (int w = 0; w < T::kWarps; ++w) {
        const float weight = merge.weight(handed(w)->reference[row]);
        const float4 part = *reinterpret_cast<const float4*>(&handed(w)->sums[row][column]);
        merge.sum += weight * handed(w)->sum[row];
        x.x += weight * part.x, x.y += weight * part.y, x.z += weight * part.z, x.w += weight * part.w;
      }
      store(merge, x, tile_.head(tile_.row + row), tile_.query(tile_.row + row), column);
    }
  }

  // The result, or that of this split.
  __device__ __forceinline__ void store(const Merge& merge, const float4& x, int head, int query, int column) const {
    const bool only = a_.splits == 1;
    const float* sinks = only ? static_cast<const float*>(p_.sinks.data) : nullptr;
    const RowEnd end(merge.top, merge.sum, sinks == nullptr ? -INFINITY : sinks[head * p_.sinks.stride_h] * kLog2E);
    const float4 out = {x.x * end.factor, x.y * end.factor, x.z * end.factor, x.w * end.factor};
    const bool exists = column < p_.head_dim_v;
    if (only) {
      if (exists) store<Number>(p_.out, head, query, column, out);
      if (exists && p_.residual.data != nullptr) store<RoundedOff<Number>>(p_.residual, head, query, column, out);
      float* lse = static_cast<float*>(p_.lse.data);
      if (column == 0 && lse != nullptr)
        lse[tile_.b * p_.lse.stride_b + head * p_.lse.stride_h + query * p_.lse.stride_s] = end.lse * kLn2;
    } else {
      const int64_t row = tile_.part_row(a_, head, query);
      if (exists) *reinterpret_cast<float4*>(a_.part_out + row * p_.head_dim_v + column) = out;
      if (column == 0) a_.part_lse[row] = end.lse;
    }
  }

  template <class As>
  __device__ __forceinline__ void store(const View& view, int head, int query, int column, const float4& x) const {
    const int64_t at = tile_.b * view.stride_b + head * view.stride_h + query * view.stride_s + column;
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(view.data) + at) = {As::pack(x.x, x.y), As::pack(x.z, x.w)};
  }

  const Arguments& a_;
  const Params& p_;
  const PackedTile& tile_;
  int lane_;
  int piece_, end_piece_, stage_ = 0;  // of this warp: the current piece, and where in the ring it lies
  int queries_[2];                     // of this lane's rows
  ScoresOfRow scores_[2];
  Pieces pieces_;
  uint32_t ring_, offset_to_, offset_k_, offset_v_;
  RowFragments<1, T::kHeadDim> q_;
  Softmax<1> softmax_;
  bool ready_ = false;  // each row has a reference
  float acc_[1][T::kHeadDim / 8][4];
};

template <class T>
__device__ __forceinline__ void decode(const Arguments& a) {
  __shared__ PackedTile tile;  // rarely needed, and registers are
  if (threadIdx.x == 0) tile = PackedTile(a, T::kRows);
  __syncthreads();
  const int first = tile.first_key / kPiece;
  const int end = tile.end_key > tile.first_key ? (tile.end_key + kPiece - 1) / kPiece : first;
  // Splits share what there is to see, in whole steps of the block.
  const int steps = (end - first + T::kWarps * a.splits - 1) / (T::kWarps * a.splits);
  const int first_piece = min(first + tile.split * steps * T::kWarps, end);
  const int end_piece = min(first_piece + steps * T::kWarps, end);
  if (first_piece < end_piece || a.splits == 1) {
    Decode<T>(a, tile, first_piece, end_piece).run();
  } else if (threadIdx.x < T::kRows && tile.exists(tile.row + threadIdx.x)) {  // nothing to see
    const int row = tile.row + threadIdx.x;
    a.part_lse[tile.part_row(a, tile.head(row), tile.query(row))] = -INFINITY;
  }
}

}  // namespace sm80
}  // namespace cuda
}  // namespace fastattn
