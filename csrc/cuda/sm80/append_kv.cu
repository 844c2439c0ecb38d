// What calls with a cache need besides attention itself; kernels for any head dimension.
#include "../common/element.h"
#include "../host/kernel.h"
#include "../smxx/append_kv.h"
#include "../smxx/combine.h"
#include "kernels.h"

namespace fastattn {
namespace cuda {

using Bf16Append = AppendTraits<BFloat16>;
using Fp16Append = AppendTraits<Float16>;
using Bf16Combine = CombineTraits<BFloat16>;
using Fp16Combine = CombineTraits<Float16>;

FASTATTN_KERNEL(fastattn_sm80_append_bf16, Bf16Append, append)
FASTATTN_KERNEL(fastattn_sm80_append_fp16, Fp16Append, append)
FASTATTN_KERNEL(fastattn_sm80_combine_bf16, Bf16Combine, combine)
FASTATTN_KERNEL(fastattn_sm80_combine_fp16, Fp16Combine, combine)

Kernel sm80::append_kernel(DType dtype) {
  return dtype == DType::kBFloat16 ? describe<Bf16Append>() : describe<Fp16Append>();
}

Kernel sm80::combine_kernel(DType dtype) {
  return dtype == DType::kBFloat16 ? describe<Bf16Combine>() : describe<Fp16Combine>();
}

}  // namespace cuda
}  // namespace fastattn
