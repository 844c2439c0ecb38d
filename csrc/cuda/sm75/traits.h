// What the kernels for compute capability 7.5 derive from config.h: threads, operands and shared memory.
#pragma once

#include "../common/config.h"
#include "../common/tile_copy.h"
#include "../mma_sync/bwd_dkdv.h"
#include "../mma_sync/operands.h"
#include "config.h"
#include "element.h"

namespace fastattn {
namespace cuda {
namespace sm75 {

template <int kHeadDim, bool kHasScoreMod>
constexpr ForwardConfig kForwardConfig = find_config(kForward, kHeadDim, kHasScoreMod);

template <int kHeadDim_, bool kHasScoreMod_>
struct ForwardTraits
    : WarpTiling<kForwardConfig<kHeadDim_, kHasScoreMod_>.row_tiles, kForwardConfig<kHeadDim_, kHasScoreMod_>.warps> {
  using Element = Float16;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasScoreMod = kHasScoreMod_;
  static constexpr ForwardConfig kConfig = kForwardConfig<kHeadDim, kHasScoreMod>;
  using Tiling = WarpTiling<kConfig.row_tiles, kConfig.warps>;
  static constexpr int kBlockM = Tiling::kBlockRows;
  static constexpr int kBlockN = kConfig.block_n;
  static constexpr int kTileBytes = kBlockN * kHeadDim * 2;  // of K or V
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kSharedBytes = 2 * kStageBytes;
  // The queries pass through before the keys and values, 64 rows at once where all do not fit.
  static constexpr int kQueryRows = kBlockM * kHeadDim * 2 <= kSharedBytes ? kBlockM : 64;
  static constexpr int kQueriesAt = 0;

  using QOperand = Operand<Tiling::kRowTiles, kHeadDim, kConfig.q_in_smem, Tiling::kThreads>;
  template <int kTileRows>
  using Copy = RegisterCopy<kTileRows, kHeadDim, Tiling::kThreads>;
};

template <int kHeadDim, bool kHasScoreMod>
constexpr BwdDqConfig kBwdDqConfig = find_config(kBwdDq, kHeadDim, kHasScoreMod);

template <int kHeadDim_, bool kHasScoreMod_>
struct BwdDqTraits
    : WarpTiling<kBwdDqConfig<kHeadDim_, kHasScoreMod_>.row_tiles, kBwdDqConfig<kHeadDim_, kHasScoreMod_>.warps> {
  using Element = Float16;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasScoreMod = kHasScoreMod_;
  static constexpr BwdDqConfig kConfig = kBwdDqConfig<kHeadDim, kHasScoreMod>;
  using Tiling = WarpTiling<kConfig.row_tiles, kConfig.warps>;
  static constexpr int kBlockM = Tiling::kBlockRows;
  static constexpr int kBlockN = kConfig.block_n;
  static constexpr int kTileBytes = kBlockN * kHeadDim * 2;  // of K or V
  static constexpr int kStageBytes = 2 * kTileBytes;
  // Two stages of keys and values, as much as the queries and dout that pass through before them and dq after them.
  static constexpr int kQueriesAt = 0;
  static constexpr int kSharedBytes = 2 * kStageBytes;
  static_assert(kSharedBytes >= kBlockM * kHeadDim * 2, "rows pass through at once");

  using DoutOperand = RegisterOperand<Tiling::kRowTiles, kHeadDim>;
  using QOperand = RegisterOperand<Tiling::kRowTiles, kHeadDim>;
  template <int kTileRows>
  using Copy = RegisterCopy<kTileRows, kHeadDim, Tiling::kThreads>;
};

template <int kHeadDim, bool kHasScoreMod, Grads kGrads>
constexpr BwdDkdvConfig kBwdDkdvConfig = find_config(kBwdDkdv, kHeadDim, kHasScoreMod);
template <int kHeadDim, bool kHasScoreMod>
constexpr BwdDkdvConfig kBwdDkdvConfig<kHeadDim, kHasScoreMod, Grads::kDk> =
    find_config(kBwdDk, kHeadDim, kHasScoreMod);
template <int kHeadDim, bool kHasScoreMod>
constexpr BwdDkdvConfig kBwdDkdvConfig<kHeadDim, kHasScoreMod, Grads::kDv> =
    find_config(kBwdDv, kHeadDim, kHasScoreMod);

template <int kHeadDim_, bool kHasScoreMod_, Grads kGrads>
struct BwdDkdvTraits : WarpTiling<kBwdDkdvConfig<kHeadDim_, kHasScoreMod_, kGrads>.row_tiles,
                                  kBwdDkdvConfig<kHeadDim_, kHasScoreMod_, kGrads>.warps> {
  using Element = Float16;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasScoreMod = kHasScoreMod_;
  static constexpr bool kHasDk = kGrads != Grads::kDv, kHasDv = kGrads != Grads::kDk;
  static constexpr BwdDkdvConfig kConfig = kBwdDkdvConfig<kHeadDim, kHasScoreMod, kGrads>;
  using Tiling = WarpTiling<kConfig.row_tiles, kConfig.warps>;
  static constexpr int kBlockN = Tiling::kBlockRows;
  static constexpr int kBlockM = kConfig.block_m;
  static constexpr int kTileBytes = kBlockM * kHeadDim * 2;  // of queries or dout
  static constexpr int kRowValueBytes = 2 * 4 * kBlockM;     // of lse or -delta, twice
  static constexpr int kStageBytes = 2 * kTileBytes + 2 * kRowValueBytes;
  static constexpr int kRowBytes = kBlockN * kHeadDim * 2;
  // Two stages, and the values where there are no registers for them. Keys pass through before these, and the gradients
  // after them.
  static constexpr int kKeysAt = 0;
  static constexpr int kValuesAt = kConfig.v_in_registers ? 0 : 2 * kStageBytes;
  static constexpr int kSharedBytes = 2 * kStageBytes + (kConfig.v_in_registers ? 0 : kRowBytes);
  static_assert(kSharedBytes >= kRowBytes, "rows pass through at once");

  using KOperand = Operand<Tiling::kRowTiles, kHeadDim, kConfig.k_in_smem, Tiling::kThreads>;
  using VOperand = OperandIn<kConfig.v_in_registers, Tiling::kRowTiles, kHeadDim>;
  template <int kTileRows>
  using Copy = RegisterCopy<kTileRows, kHeadDim, Tiling::kThreads>;
};

}  // namespace sm75
}  // namespace cuda
}  // namespace fastattn
