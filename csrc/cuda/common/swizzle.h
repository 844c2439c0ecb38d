// Tiles of 16-bit elements in shared memory: rows of kColumns elements in chunks of 16 bytes. The order of chunks
// within a row depends on the row, so that the 8 rows that a quarter of a warp touches at once are in different banks.
#pragma once

#include <cstdint>

#include "../ptx/registers.h"

namespace fastattn {
namespace cuda {

constexpr int kChunkBytes = 16;
constexpr int kChunkElements = 8;

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

  // One step of a product further along the row is 32 bytes. From an offset of one of the first two chunks, step number
  // `step` is at (offset ^ flip(step)) + jump(step).
  static constexpr __host__ __device__ int flip(int step) { return step * 32 % kGroupBytes; }
  static constexpr __host__ __device__ int jump(int step) { return step * 32 / kGroupBytes * kGroupBytes; }
};

// What a lane adds to a tile's address to load fragments of 16 x 16 elements with ldmatrix. Rows that are 8 apart have
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

// The row, of 8, in which a lane accesses a tile when 4 lanes share a row, chunk lane % 4 each. The 8 lanes that access
// it at once do so in two rows whose orders differ by half a group of 128 bytes.
template <int kColumns>
__device__ __forceinline__ int lane_row(int lane) {
  return Swizzle<kColumns>::kGroupBytes == 128 ? lane / 8 + (lane & 4) : lane / 4;
}

}  // namespace cuda
}  // namespace fastattn
