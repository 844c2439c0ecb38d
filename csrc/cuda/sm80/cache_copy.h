// A warp's way through a cache, contiguous or paged: pieces of 16 keys and their values, copied to shared memory. A
// page is a whole number of pieces, so that a piece lies within one.
#pragma once

#include "../common/grid.h"
#include "../common/packed_block_info.h"
#include "../common/paged_cache.h"
#include "../common/swizzle.h"
#include "../ptx/async_copy.h"

namespace fastattn {
namespace cuda {
namespace sm80 {

constexpr int kPiece = kPageUnit;

template <int kColumns>
class CachePieces {
  using S = Swizzle<kColumns>;
  static constexpr int kLanes = 4;    // per row, of 16 bytes each
  static constexpr int kRowStep = 8;  // rows that a warp copies at once
  static constexpr int kTileBytes = kPiece * kColumns * 2;

 public:
  // Of the keys that a tile sees, from piece number `piece` on, every step-th up to `end_piece`.
  __device__ __forceinline__ CachePieces(const Params& p, const PackedTile& tile, int piece, int end_piece, int step)
      : p_(p), tile_(tile), page_(static_cast<int>(tile.b)), piece_(piece), end_piece_(end_piece), step_(step) {
    find_page();
  }

  // What a lane adds to a tile's address for `next`.
  static __device__ __forceinline__ uint32_t lane_offset() { return S::offset(row(), chunk()); }

  // Asks for the next piece, if there is one: keys to `to`, a tile's address plus lane_offset, values behind them. Rows
  // that no query of the tile sees become 0 and are not read.
  __device__ __forceinline__ void next(uint32_t to) {
    if (piece_ < end_piece_) {
      const int key = piece_ * kPiece;
      const bool whole = key >= tile_.first_key && key + kPiece <= tile_.end_key && p_.head_dim == kColumns &&
                         p_.head_dim_v == kColumns;
      if (whole) {
        copy<true>(to);
      } else {
        copy<false>(to);
      }
      piece_ += step_;
      find_page();
    }
    ptx::cp_async_commit_group();
  }

 private:
  // This lane's first row and chunk of a tile.
  static __device__ __forceinline__ int row() { return lane_row<kColumns>(threadIdx.x % 32); }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % kLanes; }

  // Where the piece that comes next lies: looked up a step ahead of its copy, which would have to wait.
  __device__ __forceinline__ void find_page() {
    slot_ = piece_ * kPiece;
    if (tile_.pages == nullptr || piece_ >= end_piece_) return;
    const int page_size = static_cast<int>(p_.page_size), entry = slot_ / page_size;
    page_ = tile_.pages[entry];
    slot_ -= entry * page_size;
  }

  // kWhole: every row and column exists.
  template <bool kWhole>
  __device__ __forceinline__ void copy(uint32_t to) const {
    const int64_t page = tile_.pages == nullptr ? page_ : existing_page(p_, page_);
    copy<kWhole>(p_.k, tile_.keys, page, static_cast<int>(p_.head_dim), to);
    copy<kWhole>(p_.v, tile_.values, page, static_cast<int>(p_.head_dim_v), to + kTileBytes);
  }

  // `rows`: of page 0.
  template <bool kWhole>
  __device__ __forceinline__ void copy(const View& view, const char* rows, int64_t page, int columns,
                                       uint32_t to) const {
    const int key = piece_ * kPiece + row(), first = tile_.first_key - key, end = tile_.end_key - key;
    const char* from = rows + (page * view.stride_b + (slot_ + row()) * view.stride_s) * 2 + chunk() * kChunkBytes;
    unrolled<kPiece / kRowStep>([&](auto i) {
      constexpr int kRow = i * kRowStep;
      unrolled<kColumns / kChunkNumbers / kLanes>([&](auto g) {
        constexpr int kColumn = g * kLanes * kChunkNumbers;
        const bool exists = kWhole || (first <= kRow && kRow < end && chunk() * kChunkNumbers + kColumn < columns);
        ptx::cp_async_16<kRow * S::kRowBytes + S::jump(2 * g)>(to ^ S::flip(2 * g), from + kColumn * 2, exists);
      });
      from += kRowStep * view.stride_s * 2;
    });
  }

  const Params& p_;
  const PackedTile& tile_;
  int page_, slot_;  // of the next piece: its page, as in the table, and first row in it
  int piece_, end_piece_, step_;
};

}  // namespace sm80
}  // namespace cuda
}  // namespace fastattn
