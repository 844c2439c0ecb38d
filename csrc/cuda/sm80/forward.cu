// Compiled once per head dimension, FASTATTN_HEAD_DIM.
#include "../common/define_kernel.h"
#include "../mma_sync/forward.h"
#include "kernels.h"
#include "traits.h"

namespace fastattn {
namespace cuda {

using Bf16 = sm80::ForwardTraits<BFloat16, FASTATTN_HEAD_DIM, false>;
using Bf16ScoreMod = sm80::ForwardTraits<BFloat16, FASTATTN_HEAD_DIM, true>;
using Fp16 = sm80::ForwardTraits<Float16, FASTATTN_HEAD_DIM, false>;
using Fp16ScoreMod = sm80::ForwardTraits<Float16, FASTATTN_HEAD_DIM, true>;

FASTATTN_KERNEL(FASTATTN_NAME(sm80, forward, bf16, FASTATTN_HEAD_DIM), Bf16, forward)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, forward, bf16_score_mod, FASTATTN_HEAD_DIM), Bf16ScoreMod, forward)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, forward, fp16, FASTATTN_HEAD_DIM), Fp16, forward)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, forward, fp16_score_mod, FASTATTN_HEAD_DIM), Fp16ScoreMod, forward)

template <>
Kernel sm80::kernel<Family::kForward, FASTATTN_HEAD_DIM>(DType dtype, bool has_score_mod) {
  return pick<Bf16, Bf16ScoreMod, Fp16, Fp16ScoreMod>(dtype, has_score_mod);
}

}  // namespace cuda
}  // namespace fastattn
