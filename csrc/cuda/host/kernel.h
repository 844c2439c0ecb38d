// A compiled kernel, as the host launches it: one of a family of the same body for a type, a head dimension and calls
// with or without softcap and ALiBi. Every kernel takes Arguments by value, and a grid of one dimension.
#pragma once

#include "../common/arguments.h"

namespace fastattn {
namespace cuda {

struct Kernel {
  const char* name;  // as profilers show it
  const void* function;
  int threads;       // per block
  int shared_bytes;  // dynamic, per block
  int rows;          // queries or keys that a block owns
};

// The gradients of keys and of values: one kernel for both, or one for each.
struct KeyGradients {
  Kernel keys, values;
};

// fastattn_sm80_forward_bf16_general_d64, say.
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
            TRAITS::kRows};                                                                                     \
  }

// The kernel of a family for a type, plain or general.
template <class Bf16, class Bf16General, class Fp16, class Fp16General>
Kernel pick(DType dtype, bool general) {
  if (dtype == DType::kBFloat16) return general ? describe<Bf16General>() : describe<Bf16>();
  return general ? describe<Fp16General>() : describe<Fp16>();
}

}  // namespace cuda
}  // namespace fastattn
