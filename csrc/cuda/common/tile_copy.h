// Copies of tiles from global to shared memory, while the products of other tiles go on: two ways with the same
// interface. `ask` starts a copy, `land` ends it; the next barrier shows the tile to all threads.
//   AsyncCopy     the copy runs beside the threads (sm_80 and up); `land` waits for all that were asked for
//   RegisterCopy  the numbers wait in registers until `land` stores them
#pragma once

#include <cstdint>

#include "../../call/params.h"
#include "../ptx/async_copy.h"
#include "../ptx/memory.h"
#include "arch.h"
#include "block_info.h"
#include "swizzle.h"

namespace fastattn {
namespace cuda {

// A thread's part in copying tiles of kRows rows by kThreads threads: a chunk in every kThreads / kLanes-th row, and in
// each group of kLanes chunks.
template <int kRows, int kColumns, int kThreads>
class CopySource {
  static constexpr int kLanes = Swizzle<kColumns>::kGroupBytes / kChunkBytes;
  static constexpr int kGroups = kColumns / kChunkNumbers / kLanes;
  static constexpr int kRowStep = kThreads / kLanes;
  static_assert(kRows % kRowStep == 0 && kRowStep % 8 == 0, "whole steps, between which the order of chunks repeats");

 public:
  static constexpr int kChunks = kRows / kRowStep * kGroups;
  static constexpr int kTileBytes = kRows * kColumns * 2;

  // columns: numbers in a row of the tensor, a multiple of 8; the tile's further columns become 0.
  __device__ __forceinline__ CopySource(const View& view, int64_t b, int64_t head, int64_t first_row, int columns)
      : view_(view), stride_(view.stride_s * 2) {
    source_ = static_cast<const char*>(view.data) + (b * view.stride_b + head * view.stride_h) * 2 +
              (first_row + row()) * stride_ + chunk() * kChunkBytes;
    columns_ = columns - chunk() * kChunkNumbers;
  }

  // The row of a tile that this thread's first chunk lies in, and where in the tile.
  static __device__ __forceinline__ int row() { return threadIdx.x / kLanes; }
  static __device__ __forceinline__ uint32_t offset(uint32_t thread = threadIdx.x) {
    return Swizzle<kColumns>::offset(thread / kLanes, thread % kLanes);
  }

  // Where chunk i lies in the tile, from offset() on.
  static constexpr __host__ __device__ int chunk_offset(int i) {
    return i / kGroups * kRowStep * kColumns * 2 + i % kGroups * kLanes * kChunkBytes;
  }

  // Visits the chunks of the next tile with body(i, from, exists). Of its rows, `left` exist from row() on.
  template <class Body>
  __device__ __forceinline__ void next(int left, const Body& body) {
    const int64_t stride = kFrom90 ? view_.stride_s * 2 : stride_;
    const char* from = source_;
    unrolled<kRows / kRowStep>([&](auto r) {
      unrolled<kGroups>([&](auto g) {
        const bool exists = r * kRowStep < left && g * kLanes * kChunkNumbers < columns_;
        body(Constant<r * kGroups + g>(), from + g * kLanes * kChunkBytes, exists);
      });
      from += kRowStep * stride;
    });
    source_ += kRows * stride;
  }

  // Moves on by numbers, not rows.
  __device__ __forceinline__ void skip(int64_t numbers) { source_ += numbers * 2; }

 private:
  static __device__ __forceinline__ int chunk() { return threadIdx.x % kLanes; }

  const char* source_;
  const View& view_;
  int64_t stride_;  // bytes
  int columns_;     // from this thread's first chunk on
};

// A number of 4 bytes goes to two places: an address, a multiple of 16 or 4 more, and 8 bytes behind it. Every other
// 16 threads turn to the second place first, so that a warp's 32 meet 32 banks.
__device__ __forceinline__ uint32_t word_place(uint32_t to) { return to + (threadIdx.x & 16) / 2; }

struct AsyncWord {
  __device__ __forceinline__ void ask(uint32_t to, const float* from, bool exists) {
    ptx::cp_async_4(word_place(to), from, exists);
    ptx::cp_async_4(word_place(to) ^ 8, from, exists);
  }
  __device__ __forceinline__ void land(uint32_t) const {}  // a tile's land waits for it
};

struct RegisterWord {
  __device__ __forceinline__ void ask(uint32_t, const float* from, bool exists) { held = exists ? *from : 0.0f; }
  __device__ __forceinline__ void land(uint32_t to) const {
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

  // Asks for the next tile, to `to`, a tile's address plus offset(). Of its rows, `left` exist from row() on; the
  // others become 0.
  __device__ __forceinline__ void ask(uint32_t to, int left) {
    this->next(left, [&](auto i, const char* from, bool exists) {
      ptx::cp_async_16<Source::chunk_offset(i)>(to, from, exists);
    });
  }
  __device__ __forceinline__ void land(uint32_t) const { ptx::cp_async_wait_all(); }

  using Word = AsyncWord;
  static constexpr bool kTakesRegisters = false;
};

template <int kRows, int kColumns, int kThreads>
class RegisterCopy : public CopySource<kRows, kColumns, kThreads> {
  using Source = CopySource<kRows, kColumns, kThreads>;

 public:
  using Source::Source;

  using Word = RegisterWord;
  static constexpr bool kTakesRegisters = true;

  __device__ __forceinline__ void ask(uint32_t, int left) {
    this->next(left, [&](auto i, const char* from, bool exists) { ptx::ld_global_16(held_[i], from, exists); });
  }
  __device__ __forceinline__ void land(uint32_t to) const {
    unrolled<Source::kChunks>([&](auto i) { ptx::st_shared_16<Source::chunk_offset(i)>(to, held_[i]); });
  }

 private:
  uint32_t held_[Source::kChunks][4];
};

// Keys and values, block after block. Copy: one of the above. Copies that take registers have either keys or values
// under way: the values follow halfway.
template <class Copy>
class KeyValueCopy {
 public:
  // From the first key on that the tile sees.
  __device__ __forceinline__ KeyValueCopy(const Params& p, const Tile& t)
      : keys_(kFrom90 ? t.keys : p.k, t.b, t.head / t.group, t.sequence.k_begin + t.first,
              static_cast<int>(p.head_dim)),
        values_(kFrom90 ? t.values : p.v, t.b, t.head / t.group, t.sequence.k_begin + t.first,
                static_cast<int>(p.head_dim_v)),
        offset_(ptx::kept(Copy::offset())) {}

  // Each block is asked for, comes halfway, and lands: keys at `tile`, values behind them. Of its rows, `rows` exist;
  // the others become 0.
  __device__ __forceinline__ void ask(uint32_t tile, int rows) {
    keys_.ask(tile + offset(), rows - Copy::row());
    if constexpr (!Copy::kTakesRegisters) ask_values(tile, rows);
  }
  __device__ __forceinline__ void halfway(uint32_t tile, int rows) {
    if constexpr (Copy::kTakesRegisters) {
      keys_.land(tile + offset());
      ask_values(tile, rows);
    }
  }
  __device__ __forceinline__ void land(uint32_t tile) { values_.land(tile + offset() + Copy::kTileBytes); }

 private:
  // Where this thread's part of a tile is.
  __device__ __forceinline__ uint32_t offset() const { return kFrom90 ? Copy::offset(ptx::thread_index()) : offset_; }

  __device__ __forceinline__ void ask_values(uint32_t tile, int rows) {
    values_.ask(tile + offset() + Copy::kTileBytes, rows - Copy::row());
  }

  Copy keys_, values_;
  uint32_t offset_;
};

}  // namespace cuda
}  // namespace fastattn
