// Compiled once per head dimension, FASTATTN_HEAD_DIM.
#include "../common/define_kernel.h"
#include "../mma_sync/forward.h"
#include "kernels.h"
#include "traits.h"

namespace fastattn {
namespace cuda {

using Fp16 = sm75::ForwardTraits<FASTATTN_HEAD_DIM, false>;
using Fp16ScoreMod = sm75::ForwardTraits<FASTATTN_HEAD_DIM, true>;

FASTATTN_KERNEL(FASTATTN_NAME(sm75, forward, fp16, FASTATTN_HEAD_DIM), Fp16, forward)
FASTATTN_KERNEL(FASTATTN_NAME(sm75, forward, fp16_score_mod, FASTATTN_HEAD_DIM), Fp16ScoreMod, forward)

template <>
Kernel sm75::kernel<Family::kForward, FASTATTN_HEAD_DIM>(DType, bool has_score_mod) {
  return has_score_mod ? describe<Fp16ScoreMod>() : describe<Fp16>();
}

}  // namespace cuda
}  // namespace fastattn
