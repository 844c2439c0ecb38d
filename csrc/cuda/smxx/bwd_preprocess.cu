#include "../common/define_kernel.h"
#include "../common/element.h"
#include "bwd_preprocess.h"
#include "kernels.h"

namespace fastattn {
namespace cuda {

using Bf16 = BwdPreprocessTraits<BFloat16>;
using Fp16 = BwdPreprocessTraits<Float16>;

FASTATTN_KERNEL(fastattn_bwd_preprocess_bf16, Bf16, bwd_preprocess)
FASTATTN_KERNEL(fastattn_bwd_preprocess_fp16, Fp16, bwd_preprocess)
FASTATTN_KERNEL(fastattn_bwd_dsinks, BwdDsinksTraits, bwd_dsinks)

Kernel smxx::bwd_preprocess_kernel(DType dtype) {
  return dtype == DType::kBFloat16 ? describe<Bf16>() : describe<Fp16>();
}

Kernel smxx::bwd_dsinks_kernel() { return describe<BwdDsinksTraits>(); }

}  // namespace cuda
}  // namespace fastattn
