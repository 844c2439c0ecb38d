// Compiled once per head dimension, FASTATTN_HEAD_DIM.
#include "../kernel.h"
#include "gradient_of_keys.h"
#include "gradient_of_queries.h"
#include "kernels.h"

namespace fastattn {
namespace cuda {

constexpr int kDim = FASTATTN_HEAD_DIM;

namespace queries {

using Bf16 = sm80::QueryGradientTraits<BFloat16, kDim, false>;
using Bf16General = sm80::QueryGradientTraits<BFloat16, kDim, true>;
using Fp16 = sm80::QueryGradientTraits<Float16, kDim, false>;
using Fp16General = sm80::QueryGradientTraits<Float16, kDim, true>;

}  // namespace queries

namespace keys {

// Registers hold the sums of both gradients up to head_dim 128.
constexpr sm80::Of kOf = kDim > 128 ? sm80::Of::kKeys : sm80::Of::kBoth;
using Bf16 = sm80::KeyGradientTraits<BFloat16, kDim, false, kOf>;
using Bf16General = sm80::KeyGradientTraits<BFloat16, kDim, true, kOf>;
using Fp16 = sm80::KeyGradientTraits<Float16, kDim, false, kOf>;
using Fp16General = sm80::KeyGradientTraits<Float16, kDim, true, kOf>;

}  // namespace keys

FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_queries, bf16, FASTATTN_HEAD_DIM), queries::Bf16,
                sm80::gradient_of_queries)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_queries, bf16_general, FASTATTN_HEAD_DIM), queries::Bf16General,
                sm80::gradient_of_queries)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_queries, fp16, FASTATTN_HEAD_DIM), queries::Fp16,
                sm80::gradient_of_queries)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_queries, fp16_general, FASTATTN_HEAD_DIM), queries::Fp16General,
                sm80::gradient_of_queries)

FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_keys, bf16, FASTATTN_HEAD_DIM), keys::Bf16, sm80::gradient_of_keys)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_keys, bf16_general, FASTATTN_HEAD_DIM), keys::Bf16General,
                sm80::gradient_of_keys)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_keys, fp16, FASTATTN_HEAD_DIM), keys::Fp16, sm80::gradient_of_keys)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_keys, fp16_general, FASTATTN_HEAD_DIM), keys::Fp16General,
                sm80::gradient_of_keys)

template <>
Kernel sm80::QueryGradientKernels<kDim>::get(DType dtype, bool general) {
  using namespace queries;
  return pick<Bf16, Bf16General, Fp16, Fp16General>(dtype, general);
}

#if FASTATTN_HEAD_DIM > 128
namespace values {

using Bf16 = sm80::KeyGradientTraits<BFloat16, kDim, false, sm80::Of::kValues>;
using Bf16General = sm80::KeyGradientTraits<BFloat16, kDim, true, sm80::Of::kValues>;
using Fp16 = sm80::KeyGradientTraits<Float16, kDim, false, sm80::Of::kValues>;
using Fp16General = sm80::KeyGradientTraits<Float16, kDim, true, sm80::Of::kValues>;

}  // namespace values

FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_values, bf16, FASTATTN_HEAD_DIM), values::Bf16, sm80::gradient_of_keys)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_values, bf16_general, FASTATTN_HEAD_DIM), values::Bf16General,
                sm80::gradient_of_keys)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_values, fp16, FASTATTN_HEAD_DIM), values::Fp16, sm80::gradient_of_keys)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, gradient_of_values, fp16_general, FASTATTN_HEAD_DIM), values::Fp16General,
                sm80::gradient_of_keys)
#else
namespace values = keys;
#endif

template <>
sm80::KeyGradients sm80::KeyGradientKernels<kDim>::get(DType dtype, bool general) {
  return {pick<keys::Bf16, keys::Bf16General, keys::Fp16, keys::Fp16General>(dtype, general),
          pick<values::Bf16, values::Bf16General, values::Fp16, values::Fp16General>(dtype, general)};
}

}  // namespace cuda
}  // namespace fastattn
