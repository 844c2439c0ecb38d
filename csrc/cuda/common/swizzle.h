// Tiles of 16-bit numbers in shared memory: rows of kColumns numbers in chunks of 16 bytes, whose order within a row
// depends on the row, so that the 8 rows that a quarter of a warp touches at once lie in different banks.
#pragma once

#include <cstdint>

#include "../../call/params.h"
#include "../ptx/registers.h"
#include "static_for.h"

namespace fastattn {
namespace cuda {

constexpr int kChunkBytes = 16;
constexpr int kChunkNumbers = 8;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The shared memory that a launch asks for.
__device__ __forceinline__ char* dynamic_shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

template <int kColumns>
struct Swizzle {
  static_assert(kColumns % 32 == 0, "rows of whole groups of four chunks");
  static constexpr int kRowBytes = kColumns * 2;
  // A row of a multiple of 128 bytes starts in bank 0: all 8 chunks of a group trade places. Other rows start in
  // bank 0 and 16 in turn: groups of 4 chunks do, every second row.
  static constexpr int kGroupBytes = kRowBytes % 128 == 0 ? 128 : 64;

  static __device__ __forceinline__ int key(int row) { return kGroupBytes == 128 ? row & 7 : (row >> 1) & 3; }

  // Byte offset of a chunk.
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ key(row)) * kChunkBytes);
  }

  // One step of a product further along the row is 32 bytes; from an offset of one of the first two chunks, step number
  // `step` is at (offset ^ flip(step)) + jump(step).
  static constexpr __host__ __device__ int flip(int step) { return step * 32 % kGroupBytes; }
  static constexpr __host__ __device__ int jump(int step) { return step * 32 / kGroupBytes * kGroupBytes; }
};

// What a lane adds to a tile's address to load fragments of 16 x 16 numbers with ldmatrix. Rows that lie 8 apart have
// the same order of chunks, so that further rows are a constant away.
//   A operand, or transposed B: matrices (rows 0-7, chunk 0), (8-15, 0), (0-7, 1), (8-15, 1)
//   B operand:                  matrices (rows 0-7, chunk 0), (0-7, 1), (8-15, 0), (8-15, 1)
template <int kColumns>
__device__ __forceinline__ uint32_t lane_offset_a(int lane) {
  return ptx::kept(Swizzle<kColumns>::offset(lane & 15, lane >> 4));
}
template <int kColumns>
__device__ __forceinline__ uint32_t lane_offset_b(int lane) {
  return Swizzle<kColumns>::offset((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
}

// Rounds this lane's part of a row into a warp's tile: row 8 r + lane / 4 of 16-row tile m, of which acc[n] is the
// product of columns 8 n to 8 n + 7, times a factor.
template <class Number, int kColumns>
__device__ __forceinline__ void put_row(char* tile, int m, int r, const float (&acc)[kColumns / 8][4], float factor,
                                        int lane) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    const uint32_t at = Swizzle<kColumns>::offset(lane / 4, n) + (m * 16 + r * 8) * kColumns * 2;
    *reinterpret_cast<uint32_t*>(tile + at + lane % 4 * 4) =
        Number::pack(acc[n][2 * r] * factor, acc[n][2 * r + 1] * factor);
  }
}

// The row, of 8, in which a lane accesses a tile when 4 lanes share a row, chunk lane % 4 each: the 8 lanes that access
// it at once do so in two rows whose orders differ by half a group of 128 bytes.
template <int kColumns>
__device__ __forceinline__ int lane_row(int lane) {
  return Swizzle<kColumns>::kGroupBytes == 128 ? lane / 8 + (lane & 4) : lane / 4;
}

// Writes the rows of a warp's tile to a tensor: `rows` of them, `columns` numbers each, from first_row of the tensor
// on.
template <int kRows, int kColumns>
__device__ __forceinline__ void store_rows(const View& view, int64_t b, int64_t head, int64_t first_row, int rows,
                                           int columns, const char* tile, int lane) {
  constexpr int kLanes = 4;  // per row, and 8 rows at once, so that the order of chunks repeats
  const int row = lane_row<kColumns>(lane), chunk = lane % kLanes;
  char* to = static_cast<char*>(view.data) +
             (b * view.stride_b + head * view.stride_h + (first_row + row) * view.stride_s) * 2 + chunk * kChunkBytes;
  unrolled<kColumns / kChunkNumbers / kLanes>([&](auto g) {
    const char* from = tile + Swizzle<kColumns>::offset(row, chunk + g * kLanes);
    const int exist = (chunk + g * kLanes) * kChunkNumbers < columns ? rows - row : 0;
    char* out = to + g * kLanes * kChunkBytes;
#pragma unroll
    for (int r = 0; r < kRows; r += 8, out += 8 * view.stride_s * 2)
      if (r < exist) *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(from + r * kColumns * 2);
  });
}

}  // namespace cuda
}  // namespace fastattn
