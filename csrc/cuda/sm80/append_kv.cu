#include "../common/define_kernel.h"
#include "../common/element.h"
#include "../smxx/append_kv.h"
#include "kernels.h"

namespace fastattn {
namespace cuda {

using Bf16 = AppendKvTraits<BFloat16>;
using Fp16 = AppendKvTraits<Float16>;

FASTATTN_KERNEL(fastattn_sm80_append_kv_bf16, Bf16, append_kv)
FASTATTN_KERNEL(fastattn_sm80_append_kv_fp16, Fp16, append_kv)

Kernel sm80::append_kv_kernel(DType dtype, bool) { return pick<Bf16, Bf16, Fp16, Fp16>(dtype, false); }

}  // namespace cuda
}  // namespace fastattn
