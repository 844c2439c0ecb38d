// Compiled once per head dimension, FASTATTN_HEAD_DIM.
#include "../host/kernel.h"
#include "../mma_sync/bwd_dkdv.h"
#include "../mma_sync/bwd_dq.h"
#include "element.h"
#include "kernels.h"

namespace fastattn {
namespace cuda {
namespace sm75 {

// As in the forward pass, two blocks of 4 warps share a multiprocessor where 32 rows per warp fit into registers, and
// one of 8 warps has it to itself where they do not.
template <int kHeadDim_, bool kGeneral_>
struct QueryGradientTraits {
  using Number = Float16;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kRowTiles = kHeadDim == 64 && !kGeneral ? 2 : 1;  // of 16 rows, per warp
  static constexpr int kWarps = 8 / kRowTiles;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kBlockN = 32;
  static constexpr int kTileBytes = kBlockN * kHeadDim * 2;  // of K or V
  static constexpr int kStageBytes = 2 * kTileBytes;
  // Two stages of keys and values, as much as the queries and dout that pass through before them and dq behind them.
  static constexpr int kQueriesAt = 0;
  static constexpr int kSharedBytes = 2 * kStageBytes;
  static_assert(kSharedBytes >= kRows * kHeadDim * 2, "rows pass through at once");

  using Douts = RowFragments<kRowTiles, kHeadDim>;
  using Queries = RowFragments<kRowTiles, kHeadDim>;
  template <int kTileRows>
  using Copy = RegisterCopy<kTileRows, kHeadDim, kThreads>;
};

template <int kHeadDim_, bool kGeneral_, Of kOf>
struct KeyGradientTraits {
  using Number = Float16;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr bool kOfKeys = kOf != Of::kValues, kOfValues = kOf != Of::kKeys;
  static constexpr int kRowTiles = kHeadDim == 64 && !kGeneral ? 2 : 1;  // of 16 keys, per warp
  static constexpr int kWarps = 8 / kRowTiles;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kBlockM = kRowTiles == 2 ? 16 : 32;
  static constexpr int kTileBytes = kBlockM * kHeadDim * 2;  // of queries or dout
  static constexpr int kStatisticBytes = 2 * 4 * kBlockM;    // of lse or -delta, twice
  static constexpr int kStageBytes = 2 * kTileBytes + 2 * kStatisticBytes;
  static constexpr int kRowBytes = kRows * kHeadDim * 2;
  // Two stages, and with 32 keys per warp their values, for which there are no registers. Keys pass through before
  // these, and the gradients behind them.
  static constexpr bool kValuesInRegisters = kRowTiles == 1;
  static constexpr int kKeysAt = 0;
  static constexpr int kValuesAt = kValuesInRegisters ? 0 : 2 * kStageBytes;
  static constexpr int kSharedBytes = 2 * kStageBytes + (kValuesInRegisters ? 0 : kRowBytes);
  static_assert(kSharedBytes >= kRowBytes, "rows pass through at once");

  using Keys = Fragments<kRowTiles, kHeadDim, kRowTiles == 2 ? 2 : 0, kThreads>;
  using Values = RowOperand<kValuesInRegisters, kRowTiles, kHeadDim>;
  template <int kTileRows>
  using Copy = RegisterCopy<kTileRows, kHeadDim, kThreads>;
};

}  // namespace sm75

constexpr int kDim = FASTATTN_HEAD_DIM;

using OfQueries = sm75::QueryGradientTraits<kDim, false>;
using OfQueriesGeneral = sm75::QueryGradientTraits<kDim, true>;

FASTATTN_KERNEL(FASTATTN_NAME(sm75, gradient_of_queries, fp16, FASTATTN_HEAD_DIM), OfQueries, gradient_of_queries)
FASTATTN_KERNEL(FASTATTN_NAME(sm75, gradient_of_queries, fp16_general, FASTATTN_HEAD_DIM), OfQueriesGeneral,
                gradient_of_queries)

template <>
Kernel sm75::QueryGradientKernels<kDim>::get(bool general) {
  return general ? describe<OfQueriesGeneral>() : describe<OfQueries>();
}

// Registers hold the sums of both gradients at head_dim 64.
constexpr Of kOf = kDim > 64 ? Of::kKeys : Of::kBoth;
using OfKeys = sm75::KeyGradientTraits<kDim, false, kOf>;
using OfKeysGeneral = sm75::KeyGradientTraits<kDim, true, kOf>;

FASTATTN_KERNEL(FASTATTN_NAME(sm75, gradient_of_keys, fp16, FASTATTN_HEAD_DIM), OfKeys, gradient_of_keys)
FASTATTN_KERNEL(FASTATTN_NAME(sm75, gradient_of_keys, fp16_general, FASTATTN_HEAD_DIM), OfKeysGeneral, gradient_of_keys)

#if FASTATTN_HEAD_DIM > 64
using OfValues = sm75::KeyGradientTraits<kDim, false, Of::kValues>;
using OfValuesGeneral = sm75::KeyGradientTraits<kDim, true, Of::kValues>;

FASTATTN_KERNEL(FASTATTN_NAME(sm75, gradient_of_values, fp16, FASTATTN_HEAD_DIM), OfValues, gradient_of_keys)
FASTATTN_KERNEL(FASTATTN_NAME(sm75, gradient_of_values, fp16_general, FASTATTN_HEAD_DIM), OfValuesGeneral,
                gradient_of_keys)
#else
using OfValues = OfKeys;
using OfValuesGeneral = OfKeysGeneral;
#endif

template <>
KeyGradients sm75::KeyGradientKernels<kDim>::get(bool general) {
  if (general) return {describe<OfKeysGeneral>(), describe<OfValuesGeneral>()};
  return {describe<OfKeys>(), describe<OfValues>()};
}

}  // namespace cuda
}  // namespace fastattn
