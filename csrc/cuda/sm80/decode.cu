// Compiled once per head dimension, FASTATTN_HEAD_DIM.
#include "../common/define_kernel.h"
#include "decode.h"
#include "kernels.h"

namespace fastattn {
namespace cuda {

using Bf16 = sm80::DecodeTraits<BFloat16, FASTATTN_HEAD_DIM, false>;
using Bf16ScoreMod = sm80::DecodeTraits<BFloat16, FASTATTN_HEAD_DIM, true>;
using Fp16 = sm80::DecodeTraits<Float16, FASTATTN_HEAD_DIM, false>;
using Fp16ScoreMod = sm80::DecodeTraits<Float16, FASTATTN_HEAD_DIM, true>;

FASTATTN_KERNEL(FASTATTN_NAME(sm80, decode, bf16, FASTATTN_HEAD_DIM), Bf16, sm80::decode)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, decode, bf16_score_mod, FASTATTN_HEAD_DIM), Bf16ScoreMod, sm80::decode)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, decode, fp16, FASTATTN_HEAD_DIM), Fp16, sm80::decode)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, decode, fp16_score_mod, FASTATTN_HEAD_DIM), Fp16ScoreMod, sm80::decode)

template <>
Kernel sm80::kernel<Family::kDecode, FASTATTN_HEAD_DIM>(DType dtype, bool has_score_mod) {
  return pick<Bf16, Bf16ScoreMod, Fp16, Fp16ScoreMod>(dtype, has_score_mod);
}

}  // namespace cuda
}  // namespace fastattn
