// Compiled once per head dimension, FASTATTN_HEAD_DIM.
#include "../common/define_kernel.h"
#include "../mma_sync/bwd_dq.h"
#include "kernels.h"
#include "traits.h"

namespace fastattn {
namespace cuda {

using Fp16 = sm75::BwdDqTraits<FASTATTN_HEAD_DIM, false>;
using Fp16ScoreMod = sm75::BwdDqTraits<FASTATTN_HEAD_DIM, true>;

FASTATTN_KERNEL(FASTATTN_NAME(sm75, bwd_dq, fp16, FASTATTN_HEAD_DIM), Fp16, bwd_dq)
FASTATTN_KERNEL(FASTATTN_NAME(sm75, bwd_dq, fp16_score_mod, FASTATTN_HEAD_DIM), Fp16ScoreMod, bwd_dq)

template <>
Kernel sm75::kernel<Family::kBwdDq, FASTATTN_HEAD_DIM>(DType, bool has_score_mod) {
  return has_score_mod ? describe<Fp16ScoreMod>() : describe<Fp16>();
}

}  // namespace cuda
}  // namespace fastattn
