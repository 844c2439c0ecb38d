// What the kernels for compute capability 8.0 and up derive from config.h: threads, operands and shared memory.
#pragma once

#include "../common/arch.h"
#include "../common/config.h"
#include "../common/element.h"
#include "../common/tile_copy.h"
#include "../mma_sync/bwd_dkdv.h"
#include "../mma_sync/operands.h"
#include "config.h"

namespace fastattn {
namespace cuda {
namespace sm80 {

constexpr int larger(int x, int y) { return x > y ? x : y; }

template <int kHeadDim, bool kHasScoreMod>
constexpr ForwardConfig kForwardConfig = find_config(kForward, kHeadDim, kHasScoreMod);

template <class Element_, int kHeadDim_, bool kHasScoreMod_>
struct ForwardTraits
    : WarpTiling<kForwardConfig<kHeadDim_, kHasScoreMod_>.row_tiles, kForwardConfig<kHeadDim_, kHasScoreMod_>.warps> {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasScoreMod = kHasScoreMod_;
  static constexpr ForwardConfig kConfig = kForwardConfig<kHeadDim, kHasScoreMod>;
  using Tiling = WarpTiling<kConfig.row_tiles, kConfig.warps>;
  static constexpr int kBlockM = Tiling::kBlockRows;
  static constexpr int kBlockN = kConfig.block_n;
  static constexpr int kTileBytes = kBlockN * kHeadDim * 2;  // of K or V
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kQueryRows = kBlockM;  // that pass through shared memory at once
  static constexpr int kQueriesAt = kStageBytes;
  // Two stages of keys and values. The queries pass through the second, and out leaves through the first.
  static constexpr int kSharedBytes = larger(2 * kStageBytes, kQueriesAt + kBlockM * kHeadDim * 2);

  static constexpr int kQInSmem = Arch::kShortOfRegisters ? kConfig.q_in_smem_sm90 : kConfig.q_in_smem;
  // They come after the stages, where the queries were, if there is room.
  static constexpr int kQInSmemEnd = 2 * kStageBytes + kQInSmem * Tiling::kThreads * 16;
  static constexpr int kQInSmemAt = kQInSmemEnd <= kSharedBytes ? 2 * kStageBytes : -1;
  using QOperand = Operand<Tiling::kRowTiles, kHeadDim, kQInSmem, Tiling::kThreads, kQInSmemAt>;
  template <int kTileRows>
  using Copy = AsyncCopy<kTileRows, kHeadDim, Tiling::kThreads>;
};

template <int kHeadDim, bool kHasScoreMod>
constexpr BwdDqConfig kBwdDqConfig = find_config(kBwdDq, kHeadDim, kHasScoreMod);

template <class Element_, int kHeadDim_, bool kHasScoreMod_>
struct BwdDqTraits
    : WarpTiling<kBwdDqConfig<kHeadDim_, kHasScoreMod_>.row_tiles, kBwdDqConfig<kHeadDim_, kHasScoreMod_>.warps> {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasScoreMod = kHasScoreMod_;
  static constexpr BwdDqConfig kConfig = kBwdDqConfig<kHeadDim, kHasScoreMod>;
  using Tiling = WarpTiling<kConfig.row_tiles, kConfig.warps>;
  static constexpr int kBlockM = Tiling::kBlockRows;
  static constexpr int kBlockN = kConfig.block_n;
  static constexpr int kTileBytes = kBlockN * kHeadDim * 2;  // of K or V
  static constexpr int kStageBytes = 2 * kTileBytes;
  // Two stages of keys and values. Queries and dout pass through the second, or queries stay after it; dq leaves
  // through the first.
  static constexpr int kQueriesAt = kConfig.q_in_registers ? kStageBytes : 2 * kStageBytes;
  static constexpr int kSharedBytes = larger(2 * kStageBytes, kQueriesAt + kBlockM * kHeadDim * 2);

  using DoutOperand = Operand<Tiling::kRowTiles, kHeadDim, kConfig.dout_in_smem, Tiling::kThreads>;
  using QOperand = OperandIn<kConfig.q_in_registers, Tiling::kRowTiles, kHeadDim>;
  template <int kTileRows>
  using Copy = AsyncCopy<kTileRows, kHeadDim, Tiling::kThreads>;
};

template <int kHeadDim, bool kHasScoreMod, Grads kGrads>
constexpr BwdDkdvConfig kBwdDkdvConfig = find_config(kBwdDkdv, kHeadDim, kHasScoreMod);
template <int kHeadDim, bool kHasScoreMod>
constexpr BwdDkdvConfig kBwdDkdvConfig<kHeadDim, kHasScoreMod, Grads::kDk> =
    find_config(kBwdDk, kHeadDim, kHasScoreMod);
template <int kHeadDim, bool kHasScoreMod>
constexpr BwdDkdvConfig kBwdDkdvConfig<kHeadDim, kHasScoreMod, Grads::kDv> =
    find_config(kBwdDv, kHeadDim, kHasScoreMod);

template <class Element_, int kHeadDim_, bool kHasScoreMod_, Grads kGrads>
struct BwdDkdvTraits : WarpTiling<kBwdDkdvConfig<kHeadDim_, kHasScoreMod_, kGrads>.row_tiles,
                                  kBwdDkdvConfig<kHeadDim_, kHasScoreMod_, kGrads>.warps> {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasScoreMod = kHasScoreMod_;
  static constexpr bool kHasDk = kGrads != Grads::kDv, kHasDv = kGrads != Grads::kDk;
  static constexpr BwdDkdvConfig kConfig = kBwdDkdvConfig<kHeadDim, kHasScoreMod, kGrads>;
  using Tiling = WarpTiling<kConfig.row_tiles, kConfig.warps>;
  static constexpr int kBlockN = Tiling::kBlockRows;
  static constexpr int kBlockM = kConfig.block_m;
  static constexpr int kTileBytes = kBlockM * kHeadDim * 2;  // of queries or dout
  static constexpr int kRowValueBytes = 2 * 4 * kBlockM;     // of lse or -delta, twice
  // Queries, dout, lse and -delta.
  static constexpr int kStageBytes = 2 * kTileBytes + 2 * kRowValueBytes;
  static constexpr int kRowBytes = kBlockN * kHeadDim * 2;
  // Two stages, and the keys and values that do not fit into registers. The others pass through the stages, and so do
  // the gradients on their way out.
  static constexpr int kStagesBytes = larger(2 * kStageBytes, kRowBytes);
  static constexpr int kValuesAt = kConfig.v_in_registers ? 0 : kStagesBytes;
  static constexpr int kKeysAt = kConfig.k_in_registers ? 0 : kStagesBytes + kRowBytes;
  static constexpr int kSharedBytes =
      kStagesBytes + (kHasDk && !kConfig.v_in_registers ? kRowBytes : 0) + (kConfig.k_in_registers ? 0 : kRowBytes);

  static constexpr int kKInSmem = Arch::kShortOfRegisters ? kConfig.k_in_smem_sm90 : 0;
  using KOperand = OperandIn<kConfig.k_in_registers, Tiling::kRowTiles, kHeadDim, kKInSmem, Tiling::kThreads>;
  using VOperand = OperandIn<kConfig.v_in_registers, Tiling::kRowTiles, kHeadDim>;
  template <int kTileRows>
  using Copy = AsyncCopy<kTileRows, kHeadDim, Tiling::kThreads>;
};

}  // namespace sm80
}  // namespace cuda
}  // namespace fastattn
