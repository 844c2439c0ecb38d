// Into how many splits the keys of a call with a cache are divided, so that few queries keep a whole GPU busy.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastattn {
namespace cuda {

// blocks: of threads, without splits, each over up to `keys` keys; slots: blocks that run at once.
//
// All splits of a wave take as long as the keys of one, and each costs about as much as some keys more, to begin and to
// be combined. Of the most splits that fit into 1 to 4 waves, those that end first. Only the device knows the real
// number of keys.
inline int64_t num_splits(int64_t blocks, int64_t keys, int64_t slots) {
  constexpr int64_t kMostWaves = 4, kFewestKeys = 128, kKeysOfASplit = 128;
  if (blocks == 0) return 1;
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t wanted = 1; wanted <= kMostWaves; ++wanted) {
    const int64_t count = std::clamp<int64_t>(wanted * slots / blocks, 1, std::max<int64_t>(keys / kFewestKeys, 1));
    const int64_t waves = (blocks * count + slots - 1) / slots;
    const int64_t cost = waves * ((keys + count - 1) / count + kKeysOfASplit);
    if (cost < best_cost) best = count, best_cost = cost;
  }
  return best;
}

}  // namespace cuda
}  // namespace fastattn
