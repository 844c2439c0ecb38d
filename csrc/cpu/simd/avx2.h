// AVX2 with FMA and F16C: 8 floats or 4 doubles. See simd.h for the meaning of the operations.
#pragma once

#include <immintrin.h>

#include "half.h"

namespace fastattn {
namespace FASTATTN_ISA {

struct F32 {
  using Scalar = float;
  struct Mask {
    __m256 m;
  };
  static constexpr int kWidth = 8;
  static constexpr int kTileRows = 6;
  __m256 v;

  static F32 set(float x) { return {_mm256_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static F32 load(const bf16* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
  }
  static F32 load(const fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static F32 load(const byte* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  void store(fp16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline F32 round(F32 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 scale_by_power(F32 a, F32 n) {
  // The exponent is clamped to 0, which stands for zero: results below 2^-126 vanish.
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  const __m256i exponent = _mm256_slli_epi32(_mm256_max_epi32(biased, _mm256_setzero_si256()), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(exponent))};
}
inline F32::Mask less(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline F32::Mask equal(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline F32 select(F32::Mask m, F32 yes, F32 no) { return {_mm256_blendv_ps(no.v, yes.v, m.m)}; }
inline F32::Mask operator|(F32::Mask a, F32::Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
inline bool any(F32::Mask m) { return _mm256_movemask_ps(m.m) != 0; }
inline bool all(F32::Mask m) { return _mm256_movemask_ps(m.m) == 0xff; }

inline void transpose(F32 (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m256 u[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 8
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + 2 + j]);
      u[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < 4; ++c) {
    r[c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
    r[4 + c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
  }
}

// Two vectors become one at a time, which takes half the shuffles of a transpose.
inline F32 sum_of_lanes(F32 (&r)[8]) {
  __m256 pairs[4], fours[2];
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i)  // in each half two lanes of r[2 i], and two of r[2 i + 1] between them
    pairs[i] =
        _mm256_add_ps(_mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v), _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v));
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    const __m256d a = _mm256_castps_pd(pairs[2 * i]), b = _mm256_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return {_mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                        _mm256_permute2f128_ps(fours[0], fours[1], 0x31))};
}

struct F64 {
  using Scalar = double;
  struct Mask {
    __m256d m;
  };
  static constexpr int kWidth = 4;
  static constexpr int kTileRows = 6;
  __m256d v;

  static F64 set(double x) { return {_mm256_set1_pd(x)}; }
  static F64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
};

inline F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
inline F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline F64 operator/(F64 a, F64 b) { return {_mm256_div_pd(a.v, b.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline F64 max(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
inline F64 min(F64 a, F64 b) { return {_mm256_min_pd(a.v, b.v)}; }
inline F64 abs(F64 a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
inline F64 round(F64 a) { return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F64 scale_by_power(F64 a, F64 n) {
  const __m128i biased =
      _mm_max_epi32(_mm_add_epi32(_mm256_cvtpd_epi32(n.v), _mm_set1_epi32(1023)), _mm_setzero_si128());
  const __m256i exponent = _mm256_slli_epi64(_mm256_cvtepi32_epi64(biased), 52);
  return {_mm256_mul_pd(a.v, _mm256_castsi256_pd(exponent))};
}
inline F64::Mask less(F64 a, F64 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)}; }
inline F64::Mask equal(F64 a, F64 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)}; }
inline F64 select(F64::Mask m, F64 yes, F64 no) { return {_mm256_blendv_pd(no.v, yes.v, m.m)}; }
inline F64::Mask operator|(F64::Mask a, F64::Mask b) { return {_mm256_or_pd(a.m, b.m)}; }
inline bool any(F64::Mask m) { return _mm256_movemask_pd(m.m) != 0; }
inline bool all(F64::Mask m) { return _mm256_movemask_pd(m.m) == 0xf; }

inline void transpose(F64 (&r)[4]) {
  const __m256d a = _mm256_unpacklo_pd(r[0].v, r[1].v), b = _mm256_unpackhi_pd(r[0].v, r[1].v);
  const __m256d c = _mm256_unpacklo_pd(r[2].v, r[3].v), d = _mm256_unpackhi_pd(r[2].v, r[3].v);
  r[0].v = _mm256_permute2f128_pd(a, c, 0x20);
  r[1].v = _mm256_permute2f128_pd(b, d, 0x20);
  r[2].v = _mm256_permute2f128_pd(a, c, 0x31);
  r[3].v = _mm256_permute2f128_pd(b, d, 0x31);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
