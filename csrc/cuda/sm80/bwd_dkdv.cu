// Compiled once per head dimension, FASTATTN_HEAD_DIM. Where config.h has dk and dv apart, each is a kernel of its own.
#include "../common/define_kernel.h"
#include "../mma_sync/bwd_dkdv.h"
#include "kernels.h"
#include "traits.h"

namespace fastattn {
namespace cuda {

#if FASTATTN_HEAD_DIM <= 128

using Bf16 = sm80::BwdDkdvTraits<BFloat16, FASTATTN_HEAD_DIM, false, Grads::kDkDv>;
using Bf16ScoreMod = sm80::BwdDkdvTraits<BFloat16, FASTATTN_HEAD_DIM, true, Grads::kDkDv>;
using Fp16 = sm80::BwdDkdvTraits<Float16, FASTATTN_HEAD_DIM, false, Grads::kDkDv>;
using Fp16ScoreMod = sm80::BwdDkdvTraits<Float16, FASTATTN_HEAD_DIM, true, Grads::kDkDv>;

FASTATTN_KERNEL(FASTATTN_NAME(sm80, bwd_dkdv, bf16, FASTATTN_HEAD_DIM), Bf16, bwd_dkdv)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, bwd_dkdv, bf16_score_mod, FASTATTN_HEAD_DIM), Bf16ScoreMod, bwd_dkdv)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, bwd_dkdv, fp16, FASTATTN_HEAD_DIM), Fp16, bwd_dkdv)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, bwd_dkdv, fp16_score_mod, FASTATTN_HEAD_DIM), Fp16ScoreMod, bwd_dkdv)

template <>
Kernel sm80::kernel<Family::kBwdDkdv, FASTATTN_HEAD_DIM>(DType dtype, bool has_score_mod) {
  return pick<Bf16, Bf16ScoreMod, Fp16, Fp16ScoreMod>(dtype, has_score_mod);
}

#else

using DkBf16 = sm80::BwdDkdvTraits<BFloat16, FASTATTN_HEAD_DIM, false, Grads::kDk>;
using DkBf16ScoreMod = sm80::BwdDkdvTraits<BFloat16, FASTATTN_HEAD_DIM, true, Grads::kDk>;
using DkFp16 = sm80::BwdDkdvTraits<Float16, FASTATTN_HEAD_DIM, false, Grads::kDk>;
using DkFp16ScoreMod = sm80::BwdDkdvTraits<Float16, FASTATTN_HEAD_DIM, true, Grads::kDk>;

FASTATTN_KERNEL(FASTATTN_NAME(sm80, bwd_dk, bf16, FASTATTN_HEAD_DIM), DkBf16, bwd_dkdv)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, bwd_dk, bf16_score_mod, FASTATTN_HEAD_DIM), DkBf16ScoreMod, bwd_dkdv)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, bwd_dk, fp16, FASTATTN_HEAD_DIM), DkFp16, bwd_dkdv)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, bwd_dk, fp16_score_mod, FASTATTN_HEAD_DIM), DkFp16ScoreMod, bwd_dkdv)

template <>
Kernel sm80::kernel<Family::kBwdDk, FASTATTN_HEAD_DIM>(DType dtype, bool has_score_mod) {
  return pick<DkBf16, DkBf16ScoreMod, DkFp16, DkFp16ScoreMod>(dtype, has_score_mod);
}

using DvBf16 = sm80::BwdDkdvTraits<BFloat16, FASTATTN_HEAD_DIM, false, Grads::kDv>;
using DvBf16ScoreMod = sm80::BwdDkdvTraits<BFloat16, FASTATTN_HEAD_DIM, true, Grads::kDv>;
using DvFp16 = sm80::BwdDkdvTraits<Float16, FASTATTN_HEAD_DIM, false, Grads::kDv>;
using DvFp16ScoreMod = sm80::BwdDkdvTraits<Float16, FASTATTN_HEAD_DIM, true, Grads::kDv>;

FASTATTN_KERNEL(FASTATTN_NAME(sm80, bwd_dv, bf16, FASTATTN_HEAD_DIM), DvBf16, bwd_dkdv)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, bwd_dv, bf16_score_mod, FASTATTN_HEAD_DIM), DvBf16ScoreMod, bwd_dkdv)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, bwd_dv, fp16, FASTATTN_HEAD_DIM), DvFp16, bwd_dkdv)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, bwd_dv, fp16_score_mod, FASTATTN_HEAD_DIM), DvFp16ScoreMod, bwd_dkdv)

template <>
Kernel sm80::kernel<Family::kBwdDv, FASTATTN_HEAD_DIM>(DType dtype, bool has_score_mod) {
  return pick<DvBf16, DvBf16ScoreMod, DvFp16, DvFp16ScoreMod>(dtype, has_score_mod);
}

#endif

}  // namespace cuda
}  // namespace fastattn
