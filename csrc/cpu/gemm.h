// The one matrix product behind all five of attention's:
//
//   C[r][lane] = sum_k A[r * row_stride + k * k_stride] * B[k * ldb + lane]          r < rows, lane < kVectors * kWidth
//
// Every element of A is broadcast against kVectors vectors of B, so A may lie in any order, and neither K nor V is
// packed in float32. With A = K, B = Q^T it gives S^T; with A = V^T, B = P^T it gives O^T; and so on (see forward.h and
// backward.h). Cost: rows * k * kVectors fused multiply-adds, and per k one load for each row and each vector: with 8
// rows and 2 vectors the multiply-adds bound it, not the loads.
//
// Elements are words: one float or double, or two bfloat16 that a dot product instruction takes at once.
#pragma once

#include <cstddef>

#include "simd/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

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

// What happens to the product: C = product, C += product, or C = alpha[lane] * C + product.
enum class Update { kStore, kAdd, kScaleAdd };

// A tile of kRows rows, kept in registers. Out of line: inlined into its callers, GCC spills the accumulators.
template <class E, int kRows, int kVectors, Update kUpdate, bool kUnitRows>
__attribute__((noinline)) void gemm_tile(int k, const typename E::Word* a, int64_t row_stride, int64_t k_stride,
                                         const typename E::Word* b, int64_t ldb, typename E::Scalar* c, int64_t ldc,
                                         const typename E::Scalar* alpha) {
  using V = typename E::Vector;
  constexpr int kWidth = V::kWidth;
  V acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVectors; ++i) acc[r][i] = V::set(0);
  for (int step = 0; step < k; ++step) {
    typename E::Operand right[kVectors];
    for (int i = 0; i < kVectors; ++i) right[i] = E::load(b + i * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const typename E::Operand left = E::broadcast(a + (kUnitRows ? r : r * row_stride));
      for (int i = 0; i < kVectors; ++i) acc[r][i] = E::multiply_add(left, right[i], acc[r][i]);
    }
    a += k_stride;
    b += ldb;
  }
  for (int i = 0; i < kVectors; ++i) {
    const V factor = kUpdate == Update::kScaleAdd ? V::load(alpha + i * kWidth) : V::set(1);
    for (int r = 0; r < kRows; ++r) {
      typename E::Scalar* to = c + r * ldc + i * kWidth;
      if (kUpdate == Update::kAdd) acc[r][i] = acc[r][i] + V::load(to);
      if (kUpdate == Update::kScaleAdd) acc[r][i] = fma(factor, V::load(to), acc[r][i]);
      acc[r][i].store(to);
    }
  }
}

template <class E, int kRows, int kVectors, Update kUpdate, bool kUnitRows>
void gemm_rest(int rows, int k, const typename E::Word* a, int64_t row_stride, int64_t k_stride,
               const typename E::Word* b, int64_t ldb, typename E::Scalar* c, int64_t ldc,
               const typename E::Scalar* alpha) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      gemm_tile<E, kRows, kVectors, kUpdate, kUnitRows>(k, a, row_stride, k_stride, b, ldb, c, ldc, alpha);
    } else {
      gemm_rest<E, kRows - 1, kVectors, kUpdate, kUnitRows>(rows, k, a, row_stride, k_stride, b, ldb, c, ldc, alpha);
    }
  }
}

template <class E, int kVectors, Update kUpdate, bool kUnitRows>
void gemm_rows(int rows, int k, const typename E::Word* a, int64_t row_stride, int64_t k_stride,
               const typename E::Word* b, int64_t ldb, typename E::Scalar* c, int64_t ldc,
               const typename E::Scalar* alpha) {
  constexpr int kTile = E::Vector::kTileRows;
  int r = 0;
  for (; r + kTile <= rows; r += kTile) {
    gemm_tile<E, kTile, kVectors, kUpdate, kUnitRows>(k, a + r * row_stride, row_stride, k_stride, b, ldb, c + r * ldc,
                                                      ldc, alpha);
  }
  gemm_rest<E, kTile - 1, kVectors, kUpdate, kUnitRows>(rows - r, k, a + r * row_stride, row_stride, k_stride, b, ldb,
                                                        c + r * ldc, ldc, alpha);
}

// k counts words. alpha is read by kScaleAdd alone.
template <class E, int kVectors, Update kUpdate>
void gemm(int rows, int k, const typename E::Word* a, int64_t row_stride, int64_t k_stride, const typename E::Word* b,
          int64_t ldb, typename E::Scalar* c, int64_t ldc, const typename E::Scalar* alpha = nullptr) {
  if (row_stride == 1) {
    gemm_rows<E, kVectors, kUpdate, true>(rows, k, a, 1, k_stride, b, ldb, c, ldc, alpha);
  } else {
    gemm_rows<E, kVectors, kUpdate, false>(rows, k, a, row_stride, k_stride, b, ldb, c, ldc, alpha);
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
