// Copies of keys and values, for the main loops over keys.
#pragma once

#include "../common/block_info.h"
#include "../common/tile_copy.h"

namespace fastattn {
namespace cuda {

// Keys and values, block after block. Copies through registers have either keys or values under way: `advance` stores
// the keys and issues the values.
template <class Copy>
class KeyValueCopy {
 public:
  // From the first key on that the block's rows see.
  __device__ __forceinline__ KeyValueCopy(const Params& p, const BlockInfo& info)
      : k_(Arch::kShortOfRegisters ? info.k : p.k, info.b, info.head / info.group,
           info.sequence.k_begin + info.columns.n_begin, static_cast<int>(p.head_dim)),
        v_(Arch::kShortOfRegisters ? info.v : p.v, info.b, info.head / info.group,
           info.sequence.k_begin + info.columns.n_begin, static_cast<int>(p.head_dim_v)),
        offset_(ptx::kept(Copy::offset())) {}

  // Each block is issued, advanced and waited for: keys go to `tile`, values after them. Of its rows, `rows` exist; the
  // others become 0.
  __device__ __forceinline__ void issue(uint32_t tile, int rows) {
    k_.issue(tile + offset(), rows - Copy::row());
    if constexpr (!Copy::kThroughRegisters) issue_values(tile, rows);
  }
  __device__ __forceinline__ void advance(uint32_t tile, int rows) {
    if constexpr (Copy::kThroughRegisters) {
      k_.wait(tile + offset());
      issue_values(tile, rows);
    }
  }
  __device__ __forceinline__ void wait(uint32_t tile) { v_.wait(tile + offset() + Copy::kTileBytes); }

 private:
  // Where this thread's part of a tile is.
  __device__ __forceinline__ uint32_t offset() const {
    return Arch::kShortOfRegisters ? Copy::offset(ptx::thread_index()) : offset_;
  }

  __device__ __forceinline__ void issue_values(uint32_t tile, int rows) {
    v_.issue(tile + offset() + Copy::kTileBytes, rows - Copy::row());
  }

  Copy k_, v_;
  uint32_t offset_;
};

}  // namespace cuda
}  // namespace fastattn
