// A warp's way through a cache, contiguous or paged: blocks of 16 keys and their values, copied to shared memory. A
// page is a whole number of blocks, so that a block lies within one.
#pragma once

#include "../common/grid.h"
#include "../common/packed_block_info.h"
#include "../common/paged_cache.h"
#include "../common/static_for.h"
#include "../common/swizzle.h"
#include "../ptx/async_copy.h"

namespace fastattn {
namespace cuda {
namespace sm80 {

constexpr int kDecodeBlockN = kPageUnit;

template <int kColumns>
class CacheCopy {
  using S = Swizzle<kColumns>;
  static constexpr int kLanes = 4;    // per row, of 16 bytes each
  static constexpr int kRowStep = 8;  // rows that a warp copies at once
  static constexpr int kTileBytes = kDecodeBlockN * kColumns * 2;

 public:
  // Of the keys that a tile sees, from block number n_block on, every step-th up to n_block_end.
  __device__ __forceinline__ CacheCopy(const Params& p, const PackedBlockInfo& info, int n_block, int n_block_end,
                                       int step)
      : p_(p), info_(info), page_(static_cast<int>(info.b)), n_block_(n_block), n_block_end_(n_block_end), step_(step) {
    find_page();
  }

  // What a lane adds to a tile's address for `issue`.
  static __device__ __forceinline__ uint32_t lane_offset() { return S::offset(row(), chunk()); }

  // Issues the next block, if there is one: keys to `to`, a tile's address plus lane_offset, values after them. Rows
  // that no query of the tile sees become 0 and are not read.
  __device__ __forceinline__ void issue(uint32_t to) {
    if (n_block_ < n_block_end_) {
      const int key = n_block_ * kDecodeBlockN;
      const bool whole = key >= info_.columns.n_begin && key + kDecodeBlockN <= info_.columns.n_end &&
                         p_.head_dim == kColumns && p_.head_dim_v == kColumns;
      if (whole) {
        copy<true>(to);
      } else {
        copy<false>(to);
      }
      n_block_ += step_;
      find_page();
    }
    ptx::cp_async_commit_group();
  }

 private:
  // This lane's first row and chunk of a tile.
  static __device__ __forceinline__ int row() { return lane_row<kColumns>(threadIdx.x % 32); }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % kLanes; }

  // Where the next block is. Looked up a step ahead of its copy, which would have to wait.
  __device__ __forceinline__ void find_page() {
    slot_ = n_block_ * kDecodeBlockN;
    if (info_.pages == nullptr || n_block_ >= n_block_end_) return;
    const int page_size = static_cast<int>(p_.page_size), entry = slot_ / page_size;
    page_ = info_.pages[entry];
    slot_ -= entry * page_size;
  }

  // kWhole: every row and column exists.
  template <bool kWhole>
  __device__ __forceinline__ void copy(uint32_t to) const {
    const int64_t page = info_.pages == nullptr ? page_ : existing_page(p_, page_);
    copy<kWhole>(p_.k, info_.k, page, static_cast<int>(p_.head_dim), to);
    copy<kWhole>(p_.v, info_.v, page, static_cast<int>(p_.head_dim_v), to + kTileBytes);
  }

  // `rows`: of page 0.
  template <bool kWhole>
  __device__ __forceinline__ void copy(const View& view, const char* rows, int64_t page, int columns,
                                       uint32_t to) const {
    const int key = n_block_ * kDecodeBlockN + row(), first = info_.columns.n_begin - key,
              end = info_.columns.n_end - key;
    const char* from = rows + (page * view.stride_b + (slot_ + row()) * view.stride_s) * 2 + chunk() * kChunkBytes;
    static_for<kDecodeBlockN / kRowStep>([&](auto i) {
      constexpr int kRow = i * kRowStep;
      static_for<kColumns / kChunkElements / kLanes>([&](auto g) {
        constexpr int kColumn = g * kLanes * kChunkElements;
        const bool exists = kWhole || (first <= kRow && kRow < end && chunk() * kChunkElements + kColumn < columns);
        ptx::cp_async_16<kRow * S::kRowBytes + S::jump(2 * g)>(to ^ S::flip(2 * g), from + kColumn * 2, exists);
      });
      from += kRowStep * view.stride_s * 2;
    });
  }

  const Params& p_;
  const PackedBlockInfo& info_;
  int page_, slot_;  // of the next block: its page, as in the table, and first row in it
  int n_block_, n_block_end_, step_;
};

}  // namespace sm80
}  // namespace cuda
}  // namespace fastattn
