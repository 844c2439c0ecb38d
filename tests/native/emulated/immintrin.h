// Stands in for the compiler's header where AVX-512 is emulated: see ../emulate.py.
//
// SIMDe has most of AVX-512, on whatever the compiler may use. What version 0.7 lacks, or does not round as the
// processor does, is here; what neither has, the compiler refuses.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include_next <immintrin.h>
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef EMULATED_BF16
#define __AVX512BF16__ 1
#endif

namespace emulated {

template <class To, class From>
To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "only the type changes");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T, int kSize>
struct Lanes {
  T x[kSize];
};

// f of each lane.
template <class To, class From, int kSize, class Result, class Vector, class F>
Result map(const Vector& vector, F f) {
  const auto from = as<Lanes<From, kSize>>(vector);
  Lanes<To, kSize> to;
  for (int i = 0; i < kSize; ++i) to.x[i] = f(from.x[i]);
  return as<Result>(to);
}

template <class Half>
struct Halves {
  Half low, high;
};

// One rounding, as the instruction has; SIMDe's has two.
inline simde__m512 fma(simde__m512 a, simde__m512 b, simde__m512 c) {
  const auto x = as<Halves<__m256>>(a), y = as<Halves<__m256>>(b), z = as<Halves<__m256>>(c);
  return as<simde__m512>(Halves<__m256>{_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)});
}
inline simde__m512d fma(simde__m512d a, simde__m512d b, simde__m512d c) {
  const auto x = as<Halves<__m256d>>(a), y = as<Halves<__m256d>>(b), z = as<Halves<__m256d>>(c);
  return as<simde__m512d>(
      Halves<__m256d>{_mm256_fmadd_pd(x.low, y.low, z.low), _mm256_fmadd_pd(x.high, y.high, z.high)});
}

// What is left after rounding to whole numbers.
template <class S>
S reduce(S x) {
  return std::isinf(x) ? S(0) : x - std::nearbyint(x);
}
inline simde__m512 reduce(simde__m512 a, int) { return map<float, float, 16, simde__m512>(a, reduce<float>); }

inline simde__m512 float_of(simde__m512i a) {
  return map<float, int32_t, 16, simde__m512>(a, [](int32_t x) { return float(x); });
}
inline simde__m512i wide(__m256i a) {
  return map<int32_t, uint16_t, 16, simde__m512i>(a, [](uint16_t x) { return int32_t(x); });
}
inline simde__m512i wide(__m128i a) {
  return map<int32_t, uint8_t, 16, simde__m512i>(a, [](uint8_t x) { return int32_t(x); });
}
inline __m256i narrow(simde__m512i a) {
  return map<uint16_t, int32_t, 16, __m256i>(a, [](int32_t x) { return uint16_t(x); });
}

inline simde__m512 float_of_half(__m256i a) {
  const auto x = as<Halves<__m128i>>(a);
  return as<simde__m512>(Halves<__m256>{_mm256_cvtph_ps(x.low), _mm256_cvtph_ps(x.high)});
}
inline __m256i half_of(simde__m512 a) {
  const auto x = as<Halves<__m256>>(a);
  return as<__m256i>(Halves<__m128i>{_mm256_cvtps_ph(x.low, 0), _mm256_cvtps_ph(x.high, 0)});
}

// To the nearest, ties to even; subnormal numbers become zero, as in the processor.
inline uint16_t bfloat16_of(float x) {
  const uint32_t bits = as<uint32_t>(x);
  if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
  if (std::fpclassify(x) == FP_SUBNORMAL) return uint16_t(bits >> 16 & 0x8000);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline __m256i bfloat16s_of(simde__m512 a) { return map<uint16_t, float, 16, __m256i>(a, bfloat16_of); }
inline simde__m512i bfloat16s_of(simde__m512 high, simde__m512 low) {
  return as<simde__m512i>(Halves<__m256i>{bfloat16s_of(low), bfloat16s_of(high)});
}

// 128-bit lanes i of a and b, two of each.
template <int kLanes, class V>
V shuffle_lanes(V a, V b) {
  const auto x = as<Lanes<__m128i, 4>>(a), y = as<Lanes<__m128i, 4>>(b);
  return as<V>(Lanes<__m128i, 4>{{x.x[kLanes & 3], x.x[kLanes >> 2 & 3], y.x[kLanes >> 4 & 3], y.x[kLanes >> 6 & 3]}});
}
template <int kOrder>
simde__m512 shuffle(simde__m512 a, simde__m512 b) {
  const auto x = as<Halves<__m256>>(a), y = as<Halves<__m256>>(b);
  return as<simde__m512>(
      Halves<__m256>{_mm256_shuffle_ps(x.low, y.low, kOrder), _mm256_shuffle_ps(x.high, y.high, kOrder)});
}

}  // namespace emulated

#undef _mm512_cvtps_ph
#undef _mm512_fmadd_pd
#undef _mm512_fmadd_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_f64x2
#undef _mm512_shuffle_ps
#define _mm512_cvtepi32_epi16 emulated::narrow
#define _mm512_cvtepi32_ps emulated::float_of
#define _mm512_cvtepu16_epi32 emulated::wide
#define _mm512_cvtepu8_epi32 emulated::wide
#define _mm512_cvtne2ps_pbh emulated::bfloat16s_of
#define _mm512_cvtneps_pbh emulated::bfloat16s_of
#define _mm512_cvtph_ps emulated::float_of_half
#define _mm512_cvtps_ph(a, rounding) emulated::half_of(a)
#define _mm512_fmadd_pd emulated::fma
#define _mm512_fmadd_ps emulated::fma
#define _mm512_reduce_ps emulated::reduce
#define _mm512_shuffle_f32x4(a, b, lanes) emulated::shuffle_lanes<lanes>(a, b)
#define _mm512_shuffle_f64x2(a, b, lanes) emulated::shuffle_lanes<lanes>(a, b)
#define _mm512_shuffle_ps(a, b, order) emulated::shuffle<order>(a, b)
