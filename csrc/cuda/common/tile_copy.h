// Copies of tiles from global to shared memory, while the products of other tiles go on: two ways with the same
// interface. `issue` starts a copy, `wait` ends it; the next barrier shows the tile to all threads.
//   AsyncCopy     the copy runs while the threads go on (sm_80 and up); `wait` waits for all that were issued
//   RegisterCopy  the elements stay in registers until `wait` stores them
#pragma once

#include <cstdint>

#include "../../call/params.h"
#include "../ptx/async_copy.h"
#include "../ptx/memory.h"
#include "arch.h"
#include "static_for.h"
#include "swizzle.h"

namespace fastattn {
namespace cuda {

// A thread's part in copying tiles of kRows rows by kThreads threads: a chunk in every kThreads / kLanes-th row, and in
// each group of kLanes chunks.
template <int kRows, int kColumns, int kThreads>
class CopySource {
  static constexpr int kLanes = Swizzle<kColumns>::kGroupBytes / kChunkBytes;
  static constexpr int kGroups = kColumns / kChunkElements / kLanes;
  static constexpr int kRowStep = kThreads / kLanes;
  static_assert(kRows % kRowStep == 0 && kRowStep % 8 == 0, "whole steps, between which the order of chunks repeats");

 public:
  static constexpr int kChunks = kRows / kRowStep * kGroups;
  static constexpr int kTileBytes = kRows * kColumns * 2;

  // columns: elements in a row of the tensor, a multiple of 8; the tile's further columns become 0.
  __device__ __forceinline__ CopySource(const View& view, int64_t b, int64_t head, int64_t first_row, int columns)
      : view_(view), stride_(view.stride_s * 2) {
    source_ = static_cast<const char*>(view.data) + (b * view.stride_b + head * view.stride_h) * 2 +
              (first_row + row()) * stride_ + chunk() * kChunkBytes;
    columns_ = columns - chunk() * kChunkElements;
  }

  // The row of a tile that has this thread's first chunk, and where in the tile it is.
  static __device__ __forceinline__ int row() { return threadIdx.x / kLanes; }
  static __device__ __forceinline__ uint32_t offset(uint32_t thread = threadIdx.x) {
    return Swizzle<kColumns>::offset(thread / kLanes, thread % kLanes);
  }

  // Where chunk i is in the tile, from offset() on.
  static constexpr __host__ __device__ int chunk_offset(int i) {
    return i / kGroups * kRowStep * kColumns * 2 + i % kGroups * kLanes * kChunkBytes;
  }

  // Visits the chunks of the next tile with body(i, from, exists). Of its rows, `left` exist from row() on.
  template <class Body>
  __device__ __forceinline__ void next(int left, const Body& body) {
    const int64_t stride = Arch::kShortOfRegisters ? view_.stride_s * 2 : stride_;
    const char* from = source_;
    static_for<kRows / kRowStep>([&](auto r) {
      static_for<kGroups>([&](auto g) {
        const bool exists = r * kRowStep < left && g * kLanes * kChunkElements < columns_;
        body(Constant<r * kGroups + g>(), from + g * kLanes * kChunkBytes, exists);
      });
      from += kRowStep * stride;
    });
    source_ += kRows * stride;
  }

  // Moves on by elements, not rows.
  __device__ __forceinline__ void skip(int64_t elements) { source_ += elements * 2; }

 private:
  static __device__ __forceinline__ int chunk() { return threadIdx.x % kLanes; }

  const char* source_;
  const View& view_;
  int64_t stride_;  // bytes
  int columns_;     // from this thread's first chunk on
};

// A float goes to two places: an address, a multiple of 16 or 4 more, and 8 bytes after it. Every other 16 threads turn
// to the second place first, so that a warp's 32 meet 32 banks.
__device__ __forceinline__ uint32_t word_place(uint32_t to) { return to + (threadIdx.x & 16) / 2; }

struct AsyncWord {
  __device__ __forceinline__ void issue(uint32_t to, const float* from, bool exists) {
    ptx::cp_async_4(word_place(to), from, exists);
    ptx::cp_async_4(word_place(to) ^ 8, from, exists);
  }
  __device__ __forceinline__ void wait(uint32_t) const {}  // the wait of a tile waits for it
};

struct RegisterWord {
  __device__ __forceinline__ void issue(uint32_t, const float* from, bool exists) { held = exists ? *from : 0.0f; }
  __device__ __forceinline__ void wait(uint32_t to) const {
    ptx::st_shared_4(word_place(to), __float_as_uint(held));
    ptx::st_shared_4(word_place(to) ^ 8, __float_as_uint(held));
  }

  float held;
};

template <int kRows, int kColumns, int kThreads>
class AsyncCopy : public CopySource<kRows, kColumns, kThreads> {
  using Source = CopySource<kRows, kColumns, kThreads>;

 public:
  using Source::Source;

  // Starts copying the next tile to `to`, a tile's address plus offset(). Of its rows, `left` exist from row() on; the
  // others become 0.
  __device__ __forceinline__ void issue(uint32_t to, int left) {
    this->next(left, [&](auto i, const char* from, bool exists) {
      ptx::cp_async_16<Source::chunk_offset(i)>(to, from, exists);
    });
  }
  __device__ __forceinline__ void wait(uint32_t) const { ptx::cp_async_wait_all(); }

  using Word = AsyncWord;
  static constexpr bool kThroughRegisters = false;
};

template <int kRows, int kColumns, int kThreads>
class RegisterCopy : public CopySource<kRows, kColumns, kThreads> {
  using Source = CopySource<kRows, kColumns, kThreads>;

 public:
  using Source::Source;

  using Word = RegisterWord;
  static constexpr bool kThroughRegisters = true;

  __device__ __forceinline__ void issue(uint32_t, int left) {
    this->next(left, [&](auto i, const char* from, bool exists) { ptx::ld_global_16(held_[i], from, exists); });
  }
  __device__ __forceinline__ void wait(uint32_t to) const {
    static_for<Source::kChunks>([&](auto i) { ptx::st_shared_16<Source::chunk_offset(i)>(to, held_[i]); });
  }

 private:
  uint32_t held_[Source::kChunks][4];
};

}  // namespace cuda
}  // namespace fastattn
