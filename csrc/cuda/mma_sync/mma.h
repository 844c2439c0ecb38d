// Products of 16-row fragments with tiles in shared memory, 16 rows or columns of the tile at a time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/block_info.h"
#include "../common/swizzle.h"
#include "../ptx/matrix.h"
#include "../ptx/memory.h"

namespace fastattn {
namespace cuda {

// The A operand of 16 rows and 16 columns.
struct Fragment {
  uint32_t r[4];
};

// kRowTiles times 16 rows of kColumns numbers as A operands, kept in registers.
template <int kRowTiles, int kColumns>
struct RowFragments {
  Fragment kept[kRowTiles][kColumns / 16];

  // From the rows that start at `tile`.
  __device__ __forceinline__ void load(uint32_t tile, int lane) {
    const uint32_t at = tile + lane_offset_a<kColumns>(lane);
    unrolled<kRowTiles>([&](auto m) {
      unrolled<kColumns / 16>([&](auto k) {
        using S = Swizzle<kColumns>;
        ptx::ldmatrix_x4<m * 16 * S::kRowBytes + S::jump(k)>(kept[m][k].r, at ^ S::flip(k));
      });
    });
  }
  template <int m, int k>
  __device__ __forceinline__ Fragment get() const {
    return kept[m][k];
  }
};

// The same, but each thread shelves its first kShelved fragments in shared memory, where registers nearly suffice: from
// kAt bytes of the dynamic shared memory on, where the rows may have been before, or, kAt < 0, in memory of its own.
// Only one operand of a kernel may have the latter, and only where all threads load at once is there the former.
template <int kRowTiles, int kColumns, int kShelved, int kThreads, int kAt>
struct ShelvedFragments {
  static constexpr int kKept = kRowTiles * kColumns / 16 - kShelved;
  static_assert(kKept >= 0, "no more shelved than there are");
  Fragment kept[kKept > 0 ? kKept : 1];

  __device__ __forceinline__ void load(uint32_t tile, int lane) {
    RowFragments<kRowTiles, kColumns> all;
    all.load(tile, lane);
    if (kAt >= 0) __syncthreads();  // all have their rows
    unrolled<kColumns / 16>([&](auto k) {
      unrolled<kRowTiles>([&](auto m) {
        constexpr int i = k * kRowTiles + m;
        if constexpr (i >= kShelved) {
          kept[i - kShelved] = all.kept[m][k];
        } else {
          ptx::st_shared_16(shelf(i), all.kept[m][k].r);
        }
      });
    });
  }
  template <int m, int k>
  __device__ __forceinline__ Fragment get() const {
    constexpr int i = k * kRowTiles + m;
    if constexpr (i >= kShelved) {
      return kept[i - kShelved];
    } else {
      Fragment a;
      ptx::ld_shared_16(a.r, shelf(i));
      return a;
    }
  }

 private:
  static __device__ __forceinline__ uint32_t shelf(int i) {
    if constexpr (kAt >= 0) {
      return shared_address(dynamic_shared_memory()) + kAt + (i * kThreads + threadIdx.x) * 16;
    } else {
      __shared__ uint4 shelves[kShelved][kThreads];
      return shared_address(&shelves[i][threadIdx.x]);
    }
  }
};

// The same, loaded from shared memory each time, where registers do not suffice.
template <int kRowTiles, int kColumns>
struct SharedRows {
  uint32_t at;

  __device__ __forceinline__ void load(uint32_t tile, int lane) { at = tile + lane_offset_a<kColumns>(lane); }
  template <int m, int k>
  __device__ __forceinline__ Fragment get() const {
    using S = Swizzle<kColumns>;
    Fragment a;
    ptx::ldmatrix_x4<m * 16 * S::kRowBytes + S::jump(k)>(a.r, at ^ S::flip(k));
    return a;
  }
};

template <int kRowTiles, int kColumns, int kShelved, int kThreads, int kAt = -1>
using Fragments = std::conditional_t<kShelved == 0, RowFragments<kRowTiles, kColumns>,
                                     ShelvedFragments<kRowTiles, kColumns, kShelved, kThreads, kAt>>;

template <bool kInRegisters, int kRowTiles, int kColumns, int kShelved = 0, int kThreads = 0>
using RowOperand = std::conditional_t<kInRegisters, Fragments<kRowTiles, kColumns, kShelved, kThreads>,
                                      SharedRows<kRowTiles, kColumns>>;

// c[m][n] = start[m][n] + rows[m] times 16 rows of a tile, transposed: the products of 16 queries with 16 keys. `at` is
// the tile's address plus lane_offset_b, kRow the first of the rows; start(m, n) is what an accumulator begins with.
template <class Number, int kColumns, int kRow = 0, int kRowTiles, class Rows, class Start>
__device__ __forceinline__ void multiply_transposed(float (&c)[kRowTiles][2][4], const Rows& rows, uint32_t at,
                                                    const Start& start) {
  unrolled<kColumns / 16>([&](auto k) {
    using S = Swizzle<kColumns>;
    uint32_t b[4];
    ptx::ldmatrix_x4<kRow * S::kRowBytes + S::jump(k)>(b, at ^ S::flip(k));
    unrolled<kRowTiles>([&](auto m) {
      const Fragment a = rows.template get<m, k>();
      unrolled<2>([&](auto n) {
        if constexpr (k == 0) {
          Number::mma(c[m][n], a.r, b[2 * n], b[2 * n + 1], start(m, n));
        } else {
          Number::mma(c[m][n], a.r, b[2 * n], b[2 * n + 1], c[m][n]);
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

template <class Number, int kColumns, int kRow = 0, int kRowTiles, class Rows>
__device__ __forceinline__ void multiply_transposed(float (&c)[kRowTiles][2][4], const Rows& rows, uint32_t at) {
  multiply_transposed<Number, kColumns, kRow>(c, rows, at, Zeros());
}

// acc[m] += a[m] times 16 rows of a tile: probabilities of 16 keys times their values. `at` is the tile's address plus
// lane_offset_a, kRow the first of the rows.
template <class Number, int kColumns, int kRow = 0, int kRowTiles>
__device__ __forceinline__ void multiply(float (&acc)[kRowTiles][kColumns / 8][4], const uint32_t (&a)[kRowTiles][4],
                                         uint32_t at) {
  unrolled<kColumns / 16>([&](auto n) {
    using S = Swizzle<kColumns>;
    uint32_t b[4];
    ptx::ldmatrix_x4_trans<kRow * S::kRowBytes + S::jump(n)>(b, at ^ S::flip(n));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      Number::mma(acc[m][2 * n], a[m], b[0], b[1], acc[m][2 * n]);
      Number::mma(acc[m][2 * n + 1], a[m], b[2], b[3], acc[m][2 * n + 1]);
    }
  });
}

// Two neighbouring products as the A operand of the next one.
template <class Number>
__device__ __forceinline__ void pack(uint32_t (&a)[4], const float (&c)[2][4]) {
  a[0] = Number::pack(c[0][0], c[0][1]);
  a[1] = Number::pack(c[0][2], c[0][3]);
  a[2] = Number::pack(c[1][0], c[1][1]);
  a[3] = Number::pack(c[1][2], c[1][3]);
}

// Writes a warp's products, times a factor, to its rows of a tile, of which `columns` numbers exist; the sequence's
// rows begin at `begin` of the tensor. They pass through the warp's part of shared memory, kPassing times 16 rows at a
// time.
template <class Number, int kColumns, int kPassing, int kRowTiles>
__device__ __forceinline__ void store_products(const View& view, const Tile& tile, int64_t begin, int warp_row,
                                               int columns, const float (&acc)[kRowTiles][kColumns / 8][4],
                                               float factor, int lane) {
  char* rows = dynamic_shared_memory() + warp_row * kPassing / kRowTiles * kColumns * 2;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) put_row<Number, kColumns>(rows, m % kPassing, r, acc[m], factor, lane);
    if ((m + 1) % kPassing) continue;
    const int row = tile.row + warp_row + (m + 1 - kPassing) * 16;
    __syncwarp();
    store_rows<16 * kPassing, kColumns>(view, tile.b, tile.head, begin + row, tile.last_row + 1 - row, columns, rows,
                                        lane);
    if (m + 1 < kRowTiles) __syncwarp();
  }
}

}  // namespace cuda
}  // namespace fastattn
