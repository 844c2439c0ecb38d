// Compiled once per head dimension, FASTATTN_HEAD_DIM.
#include "../common/arch.h"
#include "../common/element.h"
#include "../host/kernel.h"
#include "../mma_sync/forward.h"
#include "kernels.h"

namespace fastattn {
namespace cuda {
namespace sm80 {

template <class Number_, int kHeadDim_, bool kGeneral_>
struct ForwardTraits {
  using Number = Number_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kRowTiles = kHeadDim < 128 || (kHeadDim == 128 && !kGeneral) ? 2 : 1;  // of 16 rows, per warp
  static constexpr int kWarps = 8 / kRowTiles;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kBlockN = kHeadDim <= 64 ? 64 : 32;
  static constexpr int kTileBytes = kBlockN * kHeadDim * 2;  // of K or V
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kQueryRows = kRows;  // that pass through shared memory at once
  static constexpr int kQueryOffset = kStageBytes;
  // Two stages of keys and values. The queries pass through the second, and out leaves through the first.
  static constexpr int kSharedBytes =
      2 * kStageBytes > kQueryOffset + kQueryBytes ? 2 * kStageBytes : kQueryOffset + kQueryBytes;

  // Fragments for which ptxas finds no room.
  static constexpr int kShelved = kHeadDim == 32 && kGeneral ? 2
                                  : !kFrom90                 ? 0
                                  : kHeadDim == 32           ? 1
                                  : kHeadDim == 128          ? (kGeneral ? 0 : 7)
                                                             : 0;
  // They lie behind the stages where the queries were, if there was that much.
  static constexpr int kShelvedBytes = kShelved * kThreads * 16;
  static constexpr int kShelvesAt = 2 * kStageBytes + kShelvedBytes <= kSharedBytes ? 2 * kStageBytes : -1;
  using Queries = Fragments<kRowTiles, kHeadDim, kShelved, kThreads, kShelvesAt>;
  template <int kTileRows>
  using Copy = AsyncCopy<kTileRows, kHeadDim, kThreads>;
};

}  // namespace sm80

using Bf16 = sm80::ForwardTraits<BFloat16, FASTATTN_HEAD_DIM, false>;
using Bf16General = sm80::ForwardTraits<BFloat16, FASTATTN_HEAD_DIM, true>;
using Fp16 = sm80::ForwardTraits<Float16, FASTATTN_HEAD_DIM, false>;
using Fp16General = sm80::ForwardTraits<Float16, FASTATTN_HEAD_DIM, true>;

FASTATTN_KERNEL(FASTATTN_NAME(sm80, forward, bf16, FASTATTN_HEAD_DIM), Bf16, forward)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, forward, bf16_general, FASTATTN_HEAD_DIM), Bf16General, forward)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, forward, fp16, FASTATTN_HEAD_DIM), Fp16, forward)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, forward, fp16_general, FASTATTN_HEAD_DIM), Fp16General, forward)

template <>
Kernel sm80::ForwardKernels<FASTATTN_HEAD_DIM>::get(DType dtype, bool general) {
  return pick<Bf16, Bf16General, Fp16, Fp16General>(dtype, general);
}

}  // namespace cuda
}  // namespace fastattn
