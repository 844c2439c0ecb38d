// Compiled once per head dimension, FASTATTN_HEAD_DIM.
#include "../common/arch.h"
#include "../common/element.h"
#include "../host/kernel.h"
#include "../mma_sync/bwd_dkdv.h"
#include "../mma_sync/bwd_dq.h"
#include "kernels.h"

namespace fastattn {
namespace cuda {
namespace sm80 {

template <class Number_, int kHeadDim_, bool kGeneral_>
struct QueryGradientTraits {
  using Number = Number_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kRowTiles = kHeadDim <= 64 && !kGeneral ? 2 : 1;  // of 16 rows, per warp
  static constexpr bool kQueriesInRegisters = kHeadDim <= 128;
  static constexpr int kWarps = kHeadDim <= 192 ? 8 / kRowTiles : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  // At least the rows that all threads copy at once.
  static constexpr int kBlockN = kHeadDim > 192 ? 16 : kHeadDim % 64 == 0 || kRowTiles == 2 ? 32 : 64;
  static constexpr int kTileBytes = kBlockN * kHeadDim * 2;  // of K or V
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  // Two stages of keys and values. Queries and dout pass through the second, or queries stay behind it; dq leaves
  // through the first.
  static constexpr int kQueriesAt = kQueriesInRegisters ? kStageBytes : 2 * kStageBytes;
  static constexpr int kSharedBytes =
      kQueriesAt + kQueryBytes > 2 * kStageBytes ? kQueriesAt + kQueryBytes : 2 * kStageBytes;

  // On all GPUs ptxas finds no room for some at 256.
  using Douts = Fragments<kRowTiles, kHeadDim, kHeadDim == 256 ? 3 : 0, kThreads>;
  using Queries = RowOperand<kQueriesInRegisters, kRowTiles, kHeadDim>;
  template <int kTileRows>
  using Copy = AsyncCopy<kTileRows, kHeadDim, kThreads>;
};

// Fragments of the keys for which ptxas finds no room on later GPUs.
constexpr int shelved_keys(int head_dim, bool general) {
  if (general) return head_dim == 192 ? 2 : 0;
  return head_dim == 32 || head_dim == 256 ? 1 : head_dim == 64 ? 8 : head_dim == 128 ? 2 : 0;
}

template <class Number_, int kHeadDim_, bool kGeneral_, Of kOf>
struct KeyGradientTraits {
  using Number = Number_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr bool kOfKeys = kOf != Of::kValues, kOfValues = kOf != Of::kKeys;
  static constexpr int kRowTiles = kHeadDim <= 64 && !kGeneral ? 2 : 1;  // of 16 keys, per warp
  static constexpr int kWarps = kHeadDim <= 128 ? 8 / kRowTiles : 4;
  static constexpr bool kKeysInRegisters = kHeadDim <= 192 || !kGeneral || !kOfKeys;
  static constexpr bool kValuesInRegisters =
      kHeadDim == 32 || (kRowTiles == 1 && kHeadDim <= 192 && !(kGeneral && kHeadDim == 128));
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  // At least the rows that all threads copy at once.
  static constexpr int kBlockM = kHeadDim > 128 ? 16 : kHeadDim == 128 ? 32 : 64;
  static constexpr int kTileBytes = kBlockM * kHeadDim * 2;  // of queries or dout
  static constexpr int kStatisticBytes = 2 * 4 * kBlockM;    // of lse or -delta, twice
  // Queries, dout, lse and -delta.
  static constexpr int kStageBytes = 2 * kTileBytes + 2 * kStatisticBytes;
  static constexpr int kRowBytes = kRows * kHeadDim * 2;
  // Two stages, and the keys and values that do not fit into registers. The others pass through the stages, and so do
  // the gradients on their way out.
  static constexpr int kStagesBytes = 2 * kStageBytes > kRowBytes ? 2 * kStageBytes : kRowBytes;
  static constexpr int kValuesAt = kValuesInRegisters ? 0 : kStagesBytes;
  static constexpr int kKeysAt = kKeysInRegisters ? 0 : kStagesBytes + kRowBytes;
  static constexpr int kSharedBytes =
      kStagesBytes + (kOfKeys && !kValuesInRegisters ? kRowBytes : 0) + (kKeysInRegisters ? 0 : kRowBytes);

  static constexpr int kShelvedKeys = kFrom90 ? shelved_keys(kHeadDim, kGeneral) : 0;
  using Keys = RowOperand<kKeysInRegisters, kRowTiles, kHeadDim, kShelvedKeys, kThreads>;
  using Values = RowOperand<kValuesInRegisters, kRowTiles, kHeadDim>;
  template <int kTileRows>
  using Copy = AsyncCopy<kTileRows, kHeadDim, kThreads>;
};

}  // namespace sm80

constexpr int kDim = FASTATTN_HEAD_DIM;

namespace queries {

using Bf16 = sm80::QueryGradientTraits<BFloat16, kDim, false>;
using Bf16General = sm80::QueryGradientTraits<BFloat16, kDim, true>;
using Fp16 = sm80::QueryGradientTraits<Float16, kDim, false>;
using Fp16General = sm80::QueryGradientTraits<Float16, kDim, true>;

}  // namespace queries

namespace keys {

// Registers hold the sums of both gradients up to head_dim 128.
constexpr Of kOf = kDim > 128 ? Of::kKeys : Of::kBoth;
using Bf16 = sm80::KeyGradientTraits<BFloat16, kDim, false, kOf>;
using Bf16General = sm80::KeyGradientTraits<BFloat16, kDim, true, kOf>;
using Fp16 = sm80::KeyGradientTraits<Float16, kDim, false, kOf>;
using Fp16General = sm80::KeyGradientTraits<Float16, kDim, true, kOf>;

}  // namespace keys

FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_queries, bf16, FASTATTN_HEAD_DIM), queries::Bf16, gradient_of_queries)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_queries, bf16_general, FASTATTN_HEAD_DIM), queries::Bf16General,
                gradient_of_queries)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_queries, fp16, FASTATTN_HEAD_DIM), queries::Fp16, gradient_of_queries)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_queries, fp16_general, FASTATTN_HEAD_DIM), queries::Fp16General,
                gradient_of_queries)

FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_keys, bf16, FASTATTN_HEAD_DIM), keys::Bf16, gradient_of_keys)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_keys, bf16_general, FASTATTN_HEAD_DIM), keys::Bf16General,
                gradient_of_keys)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_keys, fp16, FASTATTN_HEAD_DIM), keys::Fp16, gradient_of_keys)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_keys, fp16_general, FASTATTN_HEAD_DIM), keys::Fp16General,
                gradient_of_keys)

template <>
Kernel sm80::QueryGradientKernels<kDim>::get(DType dtype, bool general) {
  using namespace queries;
  return pick<Bf16, Bf16General, Fp16, Fp16General>(dtype, general);
}

#if FASTATTN_HEAD_DIM > 128
namespace values {

using Bf16 = sm80::KeyGradientTraits<BFloat16, kDim, false, Of::kValues>;
using Bf16General = sm80::KeyGradientTraits<BFloat16, kDim, true, Of::kValues>;
using Fp16 = sm80::KeyGradientTraits<Float16, kDim, false, Of::kValues>;
using Fp16General = sm80::KeyGradientTraits<Float16, kDim, true, Of::kValues>;

}  // namespace values

FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_values, bf16, FASTATTN_HEAD_DIM), values::Bf16, gradient_of_keys)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_values, bf16_general, FASTATTN_HEAD_DIM), values::Bf16General,
                gradient_of_keys)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_values, fp16, FASTATTN_HEAD_DIM), values::Fp16, gradient_of_keys)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_values, fp16_general, FASTATTN_HEAD_DIM), values::Fp16General,
                gradient_of_keys)
#else
namespace values = keys;
#endif

template <>
KeyGradients sm80::KeyGradientKernels<kDim>::get(DType dtype, bool general) {
  return {pick<keys::Bf16, keys::Bf16General, keys::Fp16, keys::Fp16General>(dtype, general),
          pick<values::Bf16, values::Bf16General, values::Fp16, values::Fp16General>(dtype, general)};
}

}  // namespace cuda
}  // namespace fastattn
