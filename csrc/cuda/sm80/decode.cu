// Compiled once per head dimension, FASTATTN_HEAD_DIM.
#include "../host/kernel.h"
#include "decode.h"
#include "kernels.h"

namespace fastattn {
namespace cuda {

using Bf16 = sm80::DecodeTraits<BFloat16, FASTATTN_HEAD_DIM, false>;
using Bf16General = sm80::DecodeTraits<BFloat16, FASTATTN_HEAD_DIM, true>;
using Fp16 = sm80::DecodeTraits<Float16, FASTATTN_HEAD_DIM, false>;
using Fp16General = sm80::DecodeTraits<Float16, FASTATTN_HEAD_DIM, true>;

FASTATTN_KERNEL(FASTATTN_NAME(sm80, decode, bf16, FASTATTN_HEAD_DIM), Bf16, sm80::decode)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, decode, bf16_general, FASTATTN_HEAD_DIM), Bf16General, sm80::decode)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, decode, fp16, FASTATTN_HEAD_DIM), Fp16, sm80::decode)
FASTATTN_KERNEL(FASTATTN_NAME(sm80, decode, fp16_general, FASTATTN_HEAD_DIM), Fp16General, sm80::decode)

template <>
Kernel sm80::DecodeKernels<FASTATTN_HEAD_DIM>::get(DType dtype, bool general) {
  return pick<Bf16, Bf16General, Fp16, Fp16General>(dtype, general);
}

}  // namespace cuda
}  // namespace fastattn
