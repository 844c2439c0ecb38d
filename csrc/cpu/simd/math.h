// exp2 and tanh on vectors. Largest errors are measured by tests/native/simd_check.cpp.
#pragma once

#include "simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// 2^f on [-1/2, 1/2], minimising the relative error under p(0) = 1. That value must be exact: the factor that rescales
// a finished block is 2^0 as a rule, and an error there would be compounded from block to block.
inline F32 exp2_fraction(F32 f) {
  F32 p = F32::set(1.3264727252662433e-3f);
  p = fma(p, f, F32::set(9.671512785777393e-3f));
  p = fma(p, f, F32::set(5.550733744471163e-2f));
  p = fma(p, f, F32::set(2.4022242083111794e-1f));
  p = fma(p, f, F32::set(6.931469775976785e-1f));
  return fma(p, f, F32::set(1.0f));
}

// The Taylor series up to degree 13: the next term is below 5e-18.
inline F64 exp2_fraction(F64 f) {
  constexpr double kLog2[] = {6.931471805599453e-1,  2.402265069591007e-1,   5.550410866482158e-2,
                              9.618129107628477e-3,  1.333355814642844e-3,   1.540353039338161e-4,
                              1.5252733804059841e-5, 1.3215486790144309e-6,  1.0178086009239699e-7,
                              7.054911620801123e-9,  4.4455382718708116e-10, 2.5678435993488205e-11,
                              1.3691488853904128e-12};
  F64 p = F64::set(kLog2[12]);
  for (int i = 11; i >= 0; --i) p = fma(p, f, F64::set(kLog2[i]));
  return fma(p, f, F64::set(1.0));
}

// The range outside of which 2^x is 0 or infinity.
inline F32 exp2_lowest(F32) { return F32::set(-200.0f); }
inline F32 exp2_highest(F32) { return F32::set(128.0f); }
inline F64 exp2_lowest(F64) { return F64::set(-1100.0); }
inline F64 exp2_highest(F64) { return F64::set(1024.0); }

// 2^x; exactly 0 for -inf, NaN for NaN.
template <class V>
inline V exp2(V x) {
  x = min(exp2_highest(x), max(exp2_lowest(x), x));
  const V n = round(x);
  return scale_by_power(exp2_fraction(x - n), n);
}

#if FASTATTN_SIMD == FASTATTN_AVX512
// The instructions that split x give a fraction of 0 for infinities, and scale by any power: no clamps are needed.
inline F32 exp2(F32 x) { return scale_by_power(exp2_fraction(fraction(x)), round(x)); }
#endif

// Below it tanh is summed as a series: 1 - 2 / (1 + e^2x) loses relative accuracy near 0.
inline float tanh_series_limit(F32) { return 0.5f; }
inline double tanh_series_limit(F64) { return 0.1; }

template <class V>
inline V tanh(V x) {
  using S = typename V::Scalar;
  constexpr double kSeries[] = {-1382.0 / 155925.0, 62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0};
  const V square = x * x;
  V series = V::set(S(21844.0 / 6081075.0));
  for (const double c : kSeries) series = fma(series, square, V::set(S(c)));
  const V power = exp2(abs(x) * V::set(S(2.8853900817779268)));  // e^(2 |x|)
  const V magnitude = V::set(S(1)) - V::set(S(2)) / (V::set(S(1)) + power);
  const V signed_result = select(less(x, V::set(S(0))), V::set(S(0)) - magnitude, magnitude);
  return select(less(abs(x), V::set(tanh_series_limit(x))), x * series, signed_result);
}

// Lane i of the result is the sum of r[i]'s lanes, in a fixed order. r is used up.
template <class V>
inline V sum_of_lanes(V (&r)[V::kWidth]) {
  transpose(r);
#pragma GCC unroll 4
  for (int step = V::kWidth / 2; step > 0; step /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i) r[i] = r[i] + r[i + step];
  return r[0];
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
