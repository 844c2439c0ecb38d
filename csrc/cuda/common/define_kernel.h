// How a .cu file defines kernels, and describes them to the host.
#pragma once

#include "../host/kernel.h"

namespace fastattn {
namespace cuda {

// fastattn_sm80_forward_bf16_score_mod_d64, say.
#define FASTATTN_NAME_OF(ARCH, FAMILY, VARIANT, DIM) fastattn_##ARCH##_##FAMILY##_##VARIANT##_d##DIM
#define FASTATTN_NAME(ARCH, FAMILY, VARIANT, DIM) FASTATTN_NAME_OF(ARCH, FAMILY, VARIANT, DIM)

#define FASTATTN_STRING_OF(X) #X
#define FASTATTN_STRING(X) FASTATTN_STRING_OF(X)

template <class Traits>
Kernel describe();

// Defines a kernel that does BODY<TRAITS>(arguments), and describe<TRAITS>().
#define FASTATTN_KERNEL(NAME, TRAITS, BODY)                                                                     \
  extern "C" __global__ void __launch_bounds__(TRAITS::kThreads) NAME(const __grid_constant__ Arguments a) {    \
    BODY<TRAITS>(a);                                                                                            \
  }                                                                                                             \
  template <>                                                                                                   \
  Kernel describe<TRAITS>() {                                                                                   \
    return {FASTATTN_STRING(NAME), reinterpret_cast<const void*>(NAME), TRAITS::kThreads, TRAITS::kSharedBytes, \
            TRAITS::kBlockRows};                                                                                \
  }

// The kernel of a family for a dtype, with or without score_mod.
template <class Bf16, class Bf16ScoreMod, class Fp16, class Fp16ScoreMod>
Kernel pick(DType dtype, bool has_score_mod) {
  if (dtype == DType::kBFloat16) return has_score_mod ? describe<Bf16ScoreMod>() : describe<Bf16>();
  return has_score_mod ? describe<Fp16ScoreMod>() : describe<Fp16>();
}

}  // namespace cuda
}  // namespace fastattn
