// Products on their way out: from registers through shared memory to a tensor.
#pragma once

#include <cstdint>

#include "../common/block_info.h"
#include "../common/shared_memory.h"
#include "../common/static_for.h"
#include "../common/swizzle.h"

namespace fastattn {
namespace cuda {

// Rounds this lane's part of a row into a warp's tile: row 8 r + lane / 4 of 16-row tile m. acc[n] is the product of
// columns 8 n to 8 n + 7.
template <class Element, int kColumns>
__device__ __forceinline__ void put_row(char* tile, int m, int r, const float (&acc)[kColumns / 8][4], float factor,
                                        int lane) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    const uint32_t at = Swizzle<kColumns>::offset(lane / 4, n) + (m * 16 + r * 8) * kColumns * 2;
    *reinterpret_cast<uint32_t*>(tile + at + lane % 4 * 4) =
        Element::pack(acc[n][2 * r] * factor, acc[n][2 * r + 1] * factor);
  }
}

// Writes the rows of a warp's tile to a tensor: `rows` of them, `columns` elements each, from first_row of the tensor
// on.
template <int kRows, int kColumns>
__device__ __forceinline__ void store_rows(const View& view, int64_t b, int64_t head, int64_t first_row, int rows,
                                           int columns, const char* tile, int lane) {
  constexpr int kLanes = 4;  // per row, and 8 rows at once, so that the order of chunks repeats
  const int row = lane_row<kColumns>(lane), chunk = lane % kLanes;
  char* to = static_cast<char*>(view.data) +
             (b * view.stride_b + head * view.stride_h + (first_row + row) * view.stride_s) * 2 + chunk * kChunkBytes;
  static_for<kColumns / kChunkElements / kLanes>([&](auto g) {
    const char* from = tile + Swizzle<kColumns>::offset(row, chunk + g * kLanes);
    const int exist = (chunk + g * kLanes) * kChunkElements < columns ? rows - row : 0;
    char* out = to + g * kLanes * kChunkBytes;
#pragma unroll
    for (int r = 0; r < kRows; r += 8, out += 8 * view.stride_s * 2)
      if (r < exist) *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(from + r * kColumns * 2);
  });
}

// Writes a warp's products, times a factor, to its rows of a block, of which `columns` elements exist. The rows of the
// sequence begin at `begin` of the tensor. kStaged times 16 rows at once pass through the warp's part of shared memory.
template <class Element, int kColumns, int kStaged, int kRowTiles>
__device__ __forceinline__ void store_products(const View& view, const BlockInfo& info, int64_t begin, int warp_row,
                                               int columns, const float (&acc)[kRowTiles][kColumns / 8][4],
                                               float factor, int lane) {
  char* rows = dynamic_shared_memory() + warp_row * kStaged / kRowTiles * kColumns * 2;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) put_row<Element, kColumns>(rows, m % kStaged, r, acc[m], factor, lane);
    if ((m + 1) % kStaged) continue;
    const int row = info.first_row + warp_row + (m + 1 - kStaged) * 16;
    __syncwarp();
    store_rows<16 * kStaged, kColumns>(view, info.b, info.head, begin + row, info.last_row + 1 - row, columns, rows,
                                       lane);
    if (m + 1 < kRowTiles) __syncwarp();
  }
}

}  // namespace cuda
}  // namespace fastattn
