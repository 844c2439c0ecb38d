// Compiled once per head dimension, FASTATTN_HEAD_DIM. Where config.h has dk and dv apart, each is a kernel of its own.
#include "../common/define_kernel.h"
#include "../mma_sync/bwd_dkdv.h"
#include "kernels.h"
#include "traits.h"

namespace fastattn {
namespace cuda {

#if FASTATTN_HEAD_DIM <= 64

using Fp16 = sm75::BwdDkdvTraits<FASTATTN_HEAD_DIM, false, Grads::kDkDv>;
using Fp16ScoreMod = sm75::BwdDkdvTraits<FASTATTN_HEAD_DIM, true, Grads::kDkDv>;

FASTATTN_KERNEL(FASTATTN_NAME(sm75, bwd_dkdv, fp16, FASTATTN_HEAD_DIM), Fp16, bwd_dkdv)
FASTATTN_KERNEL(FASTATTN_NAME(sm75, bwd_dkdv, fp16_score_mod, FASTATTN_HEAD_DIM), Fp16ScoreMod, bwd_dkdv)

template <>
Kernel sm75::kernel<Family::kBwdDkdv, FASTATTN_HEAD_DIM>(DType, bool has_score_mod) {
  return has_score_mod ? describe<Fp16ScoreMod>() : describe<Fp16>();
}

#else

using DkFp16 = sm75::BwdDkdvTraits<FASTATTN_HEAD_DIM, false, Grads::kDk>;
using DkFp16ScoreMod = sm75::BwdDkdvTraits<FASTATTN_HEAD_DIM, true, Grads::kDk>;

FASTATTN_KERNEL(FASTATTN_NAME(sm75, bwd_dk, fp16, FASTATTN_HEAD_DIM), DkFp16, bwd_dkdv)
FASTATTN_KERNEL(FASTATTN_NAME(sm75, bwd_dk, fp16_score_mod, FASTATTN_HEAD_DIM), DkFp16ScoreMod, bwd_dkdv)

template <>
Kernel sm75::kernel<Family::kBwdDk, FASTATTN_HEAD_DIM>(DType, bool has_score_mod) {
  return has_score_mod ? describe<DkFp16ScoreMod>() : describe<DkFp16>();
}

using DvFp16 = sm75::BwdDkdvTraits<FASTATTN_HEAD_DIM, false, Grads::kDv>;
using DvFp16ScoreMod = sm75::BwdDkdvTraits<FASTATTN_HEAD_DIM, true, Grads::kDv>;

FASTATTN_KERNEL(FASTATTN_NAME(sm75, bwd_dv, fp16, FASTATTN_HEAD_DIM), DvFp16, bwd_dkdv)
FASTATTN_KERNEL(FASTATTN_NAME(sm75, bwd_dv, fp16_score_mod, FASTATTN_HEAD_DIM), DvFp16ScoreMod, bwd_dkdv)

template <>
Kernel sm75::kernel<Family::kBwdDv, FASTATTN_HEAD_DIM>(DType, bool has_score_mod) {
  return has_score_mod ? describe<DvFp16ScoreMod>() : describe<DvFp16>();
}

#endif

}  // namespace cuda
}  // namespace fastattn
