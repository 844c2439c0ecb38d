// Compiled once per head dimension, FASTATTN_HEAD_DIM.
#include "../host/kernel.h"
#include "../mma_sync/forward.h"
#include "element.h"
#include "kernels.h"

namespace fastattn {
namespace cuda {
namespace sm75 {

// Two blocks of threads per multiprocessor share 64 KiB and 65536 registers, but for head_dim 128 with softcap or
// ALiBi, where the 8 warps are one block. 32 rows per warp use each fragment of K and V twice: shared memory gives 64
// bytes per clock, a fragment in the time of two products.
template <int kHeadDim_, bool kGeneral_>
struct ForwardTraits {
  using Number = Float16;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kRowTiles = kHeadDim == 64 || !kGeneral ? 2 : 1;  // of 16 rows, per warp
  static constexpr int kWarps = 8 / kRowTiles;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kBlockN = kHeadDim == 64 ? 48 : kGeneral ? 32 : 16;
  static constexpr int kTileBytes = kBlockN * kHeadDim * 2;  // of K or V
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kSharedBytes = 2 * kStageBytes;
  // The queries pass through before the keys and values, 64 rows at once where all do not fit.
  static constexpr int kQueryRows = kRows * kHeadDim * 2 <= kSharedBytes ? kRows : 64;
  static constexpr int kQueryOffset = 0;

  using Queries = Fragments<kRowTiles, kHeadDim, kHeadDim == 128 && !kGeneral ? 6 : 0, kThreads>;
  template <int kTileRows>
  using Copy = RegisterCopy<kTileRows, kHeadDim, kThreads>;
};

}  // namespace sm75

using Fp16 = sm75::ForwardTraits<FASTATTN_HEAD_DIM, false>;
using Fp16General = sm75::ForwardTraits<FASTATTN_HEAD_DIM, true>;

FASTATTN_KERNEL(FASTATTN_NAME(sm75, forward, fp16, FASTATTN_HEAD_DIM), Fp16, forward)
FASTATTN_KERNEL(FASTATTN_NAME(sm75, forward, fp16_general, FASTATTN_HEAD_DIM), Fp16General, forward)

template <>
Kernel sm75::ForwardKernels<FASTATTN_HEAD_DIM>::get(bool general) {
  return general ? describe<Fp16General>() : describe<Fp16>();
}

}  // namespace cuda
}  // namespace fastattn
