// Tables of tile sizes: a row per head dimension, with one configuration for calls with score_mod and one without.
#pragma once

namespace fastattn {
namespace cuda {

template <class Config>
struct ConfigRow {
  int head_dim;
  Config plain, score_mod;
};

// The configuration of a head dimension. A table without such a row does not compile.
template <class Config, int kCount>
constexpr Config find_config(const ConfigRow<Config> (&table)[kCount], int head_dim, bool has_score_mod) {
  for (const ConfigRow<Config>& row : table)
    if (row.head_dim == head_dim) return has_score_mod ? row.score_mod : row.plain;
  throw "the table has no row for this head dimension";
}

// How the rows of a block are shared out: kWarps warps own kRowTiles times 16 rows each.
template <int kRowTiles_, int kWarps_>
struct WarpTiling {
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kBlockRows = kWarps * kWarpRows;
};

}  // namespace cuda
}  // namespace fastattn
