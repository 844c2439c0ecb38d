// Multiply-adds and nothing else: the ceiling that benchmarks compare the kernels with.
#pragma once

#include "../tile/gemm.h"

namespace fastattn {
namespace FASTATTN_ISA {

// `steps` multiply-adds on each of so many accumulators that no instruction waits for another. Returns the operations
// done: a multiplication and an addition are two. *sink must hold 0; it keeps the compiler from leaving them out.
template <class E>
int64_t multiply_adds(int64_t steps, volatile typename E::Scalar* sink) {
  using V = typename E::Vector;
  constexpr int kAccumulators = 12;
  typename E::Word words[V::kWidth];
  for (typename E::Word& word : words) word = typename E::Word(*sink);
  const typename E::Operand a = E::load(words);
  V acc[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) acc[i] = V::set(typename V::Scalar(i));
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators; ++i) acc[i] = E::multiply_add(a, a, acc[i]);
  }
  for (int i = 0; i < kAccumulators; ++i) {
    typename V::Scalar values[V::kWidth];
    acc[i].store(values);
    *sink = values[0];
  }
  return steps * kAccumulators * V::kWidth * E::kPerWord * 2;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
