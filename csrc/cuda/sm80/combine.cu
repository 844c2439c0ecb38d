#include "../common/define_kernel.h"
#include "../common/element.h"
#include "../smxx/combine.h"
#include "kernels.h"

namespace fastattn {
namespace cuda {

using Bf16 = CombineTraits<BFloat16>;
using Fp16 = CombineTraits<Float16>;

FASTATTN_KERNEL(fastattn_sm80_combine_bf16, Bf16, combine)
FASTATTN_KERNEL(fastattn_sm80_combine_fp16, Fp16, combine)

Kernel sm80::combine_kernel(DType dtype, bool) { return pick<Bf16, Bf16, Fp16, Fp16>(dtype, false); }

}  // namespace cuda
}  // namespace fastattn
