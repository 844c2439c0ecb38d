// Products of A operands with tiles in shared memory, 16 rows or columns of the tile at a time.
#pragma once

#include <cstdint>

#include "../ptx/matrix.h"
#include "operands.h"

namespace fastattn {
namespace cuda {

// c[m][n] = start[m][n] + a[m] times 16 rows of a tile, transposed: the products of 16 queries with 16 keys. `at` is
// the tile's address plus lane_offset_b, kRow the first of the rows; start(m, n) is what an accumulator begins with.
template <class Element, int kColumns, int kRow = 0, int kRowTiles, class A, class Start>
__device__ __forceinline__ void multiply_transposed(float (&c)[kRowTiles][2][4], const A& operand, uint32_t at,
                                                    const Start& start) {
  static_for<kColumns / 16>([&](auto k) {
    using S = Swizzle<kColumns>;
    uint32_t b[4];
    ptx::ldmatrix_x4<kRow * S::kRowBytes + S::jump(k)>(b, at ^ S::flip(k));
    static_for<kRowTiles>([&](auto m) {
      const Fragment a = operand.template get<m, k>();
      static_for<2>([&](auto n) {
        if constexpr (k == 0) {
          Element::mma(c[m][n], a.r, b[2 * n], b[2 * n + 1], start(m, n));
        } else {
          Element::mma(c[m][n], a.r, b[2 * n], b[2 * n + 1], c[m][n]);
        }
      });
    });
  });
}

template <int kRowTiles, int kTiles>
__device__ __forceinline__ void clear(float (&acc)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.0f;
}

struct Zeros {
  float zeros[4] = {};
  __device__ __forceinline__ const float (&operator()(int, int) const)[4] { return zeros; }
};

template <class Element, int kColumns, int kRow = 0, int kRowTiles, class A>
__device__ __forceinline__ void multiply_transposed(float (&c)[kRowTiles][2][4], const A& operand, uint32_t at) {
  multiply_transposed<Element, kColumns, kRow>(c, operand, at, Zeros());
}

// acc[m] += a[m] times 16 rows of a tile: probabilities of 16 keys times their values. `at` is the tile's address plus
// lane_offset_a, kRow the first of the rows.
template <class Element, int kColumns, int kRow = 0, int kRowTiles>
__device__ __forceinline__ void multiply(float (&acc)[kRowTiles][kColumns / 8][4], const uint32_t (&a)[kRowTiles][4],
                                         uint32_t at) {
  static_for<kColumns / 16>([&](auto n) {
    using S = Swizzle<kColumns>;
    uint32_t b[4];
    ptx::ldmatrix_x4_trans<kRow * S::kRowBytes + S::jump(n)>(b, at ^ S::flip(n));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      Element::mma(acc[m][2 * n], a[m], b[0], b[1], acc[m][2 * n]);
      Element::mma(acc[m][2 * n + 1], a[m], b[2], b[3], acc[m][2 * n + 1]);
    }
  });
}

// Two neighbouring products as the A operand of the next one.
template <class Element>
__device__ __forceinline__ void pack(uint32_t (&a)[4], const float (&c)[2][4]) {
  a[0] = Element::pack(c[0][0], c[0][1]);
  a[1] = Element::pack(c[0][2], c[0][3]);
  a[2] = Element::pack(c[1][0], c[1][1]);
  a[3] = Element::pack(c[1][2], c[1][3]);
}

}  // namespace cuda
}  // namespace fastattn
