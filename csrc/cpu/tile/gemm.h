// The one matrix product behind all five of attention's:
//
//   C[r][lane] = sum_k A(r, k) * B[k][lane]          r < rows, lane < kVectors * kWidth
//
// Every element of A is broadcast against kVectors vectors of B, so A may be K or V as they are: words along k are
// neighbours (gemm), or those along r (gemm_columns). With A = K, B = Q^T it gives S^T; with A = V^T, B = P^T it gives
// O^T; and so on (see forward.h and backward.h). Rows of B and C are two vectors long and follow one another. Those of
// a wider matrix, often a power of two apart, would drive one another out of the first-level cache.
//
// Cost: rows * k * kVectors fused multiply-adds, and per k one load for each row and each vector. With 8 rows and 2
// vectors the multiply-adds bound it, not the loads.
//
// Elements are words: one float or double, or two bfloat16 that one dot product instruction multiplies.
#pragma once

#include <cstddef>

#include "../simd/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Columns of B and C: the lanes of two vectors.
template <class V>
constexpr int kLanesOf = 2 * V::kWidth;

// Words of one number each.
template <class V>
struct Single {
  using Vector = V;                   // what accumulates
  using Scalar = typename V::Scalar;  // its element
  using Word = Scalar;                // what is multiplied
  static constexpr int kPerWord = 1;  // numbers in a word
  using Operand = V;
  static Operand load(const Word* p) { return V::load(p); }
  static Operand broadcast(const Word* p) { return V::set(*p); }
  static V multiply_add(Operand a, Operand b, V c) { return fma(a, b, c); }
};

#ifdef __AVX512BF16__
// Words of two bfloat16, neighbours along k.
struct Pairs {
  using Vector = F32;
  using Scalar = float;
  using Word = uint32_t;
  static constexpr int kPerWord = 2;
  using Operand = BF16Pairs;
  static Operand load(const Word* p) { return BF16Pairs::load(p); }
  static Operand broadcast(const Word* p) { return BF16Pairs::broadcast(p); }
  static F32 multiply_add(Operand a, Operand b, F32 c) { return dot(a, b, c); }
};
#endif

// What happens to the product: C = product; the same, and lanes[lane] = the maximum of itself and of C's column;
// C += product; or C = lanes[lane] * C + product.
enum class Update { kStore, kStoreMax, kAdd, kScaleAdd };

// Words of A, word (r, k) at data[r / kTileRows * tile_stride + r % kTileRows + k * stride]. Where rows are as wide as
// A a tile touches a cache line for each k. Lines a power of two apart drive one another out of the first-level cache.
// A copy in which a tile's words follow one another avoids that.
template <class E>
struct ColumnTiles {
  static constexpr int kRows = E::Vector::kTileRows;
  const typename E::Word* data;
  int64_t stride, tile_stride;
  static ColumnTiles of_rows(const typename E::Word* rows, int64_t stride) { return {rows, stride, kRows}; }
  ColumnTiles from(int64_t k) const { return {data + k * stride, stride, tile_stride}; }
  const typename E::Word* at(int64_t r, int64_t k) const {
    return data + r / kRows * tile_stride + r % kRows + k * stride;
  }
};

// A tile of kRows rows, kept in registers; stride: from one k to the next (kColumns), or from row to row.
//
// Out of line: inlined into its callers, GCC spills the accumulators. Unless all loops over them are unrolled, it also
// keeps them in memory, and writes and reads each once more. Four steps at a time: with a jump and its counting in
// each, tiles took 5 to 9 percent longer on AVX2 in a virtual machine. Its threads probably share a core's front end.
template <class E, int kRows, int kVectors, Update kUpdate, bool kColumns>
__attribute__((noinline)) void gemm_tile(int k, const typename E::Word* a, int64_t stride, const typename E::Word* b,
                                         typename E::Scalar* c, typename E::Scalar* lanes) {
  using V = typename E::Vector;
  constexpr int kWidth = V::kWidth;
  V acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) acc[r][i] = V::set(0);
#pragma GCC unroll 4
  for (int step = 0; step < k; ++step) {
    typename E::Operand right[kVectors];
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) right[i] = E::load(b + i * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const typename E::Operand left = E::broadcast(a + (kColumns ? r : r * stride));
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) acc[r][i] = E::multiply_add(left, right[i], acc[r][i]);
    }
    a += kColumns ? stride : 1;
    b += kLanesOf<V>;
  }
#pragma GCC unroll 2
  for (int i = 0; i < kVectors; ++i) {
    constexpr bool kPerLane = kUpdate == Update::kScaleAdd || kUpdate == Update::kStoreMax;
    V lane = kPerLane ? V::load(lanes + i * kWidth) : V::set(1);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      typename E::Scalar* to = c + r * kLanesOf<V> + i * kWidth;
      if (kUpdate == Update::kAdd) acc[r][i] = acc[r][i] + V::load(to);
      if (kUpdate == Update::kScaleAdd) acc[r][i] = fma(lane, V::load(to), acc[r][i]);
      if (kUpdate == Update::kStoreMax) lane = max(lane, acc[r][i]);
      acc[r][i].store(to);
    }
    if (kUpdate == Update::kStoreMax) lane.store(lanes + i * kWidth);
  }
}

template <class E, int kRows, int kVectors, Update kUpdate, bool kColumns>
void gemm_rest(int rows, int k, const typename E::Word* a, int64_t stride, const typename E::Word* b,
               typename E::Scalar* c, typename E::Scalar* lanes) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      gemm_tile<E, kRows, kVectors, kUpdate, kColumns>(k, a, stride, b, c, lanes);
    } else {
      gemm_rest<E, kRows - 1, kVectors, kUpdate, kColumns>(rows, k, a, stride, b, c, lanes);
    }
  }
}

template <class E, int kVectors, Update kUpdate, bool kColumns>
void gemm_tiles(int rows, int k, const typename E::Word* a, int64_t stride, int64_t tile_stride,
                const typename E::Word* b, typename E::Scalar* c, typename E::Scalar* lanes) {
  constexpr int kTile = E::Vector::kTileRows, kSize = kTile * kLanesOf<typename E::Vector>;
  for (; rows >= kTile; rows -= kTile, a += tile_stride, c += kSize)
    gemm_tile<E, kTile, kVectors, kUpdate, kColumns>(k, a, stride, b, c, lanes);
  gemm_rest<E, kTile - 1, kVectors, kUpdate, kColumns>(rows, k, a, stride, b, c, lanes);
}

// A(r, k) = a[r * row_stride + k]. k counts words. lanes: see Update.
template <class E, int kVectors, Update kUpdate>
void gemm(int rows, int k, const typename E::Word* a, int64_t row_stride, const typename E::Word* b,
          typename E::Scalar* c, typename E::Scalar* lanes = nullptr) {
  gemm_tiles<E, kVectors, kUpdate, false>(rows, k, a, row_stride, E::Vector::kTileRows * row_stride, b, c, lanes);
}

template <class E, int kVectors, Update kUpdate>
void gemm_columns(int rows, int k, const ColumnTiles<E>& a, const typename E::Word* b, typename E::Scalar* c,
                  typename E::Scalar* lanes = nullptr) {
  gemm_tiles<E, kVectors, kUpdate, true>(rows, k, a.data, a.stride, a.tile_stride, b, c, lanes);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
