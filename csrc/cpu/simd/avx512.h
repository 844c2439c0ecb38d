// AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles. See simd.h for the meaning of the operations.
#pragma once

#include <immintrin.h>

#include "half.h"

namespace fastattn {
namespace FASTATTN_ISA {

struct F32 {
  using Scalar = float;
  using Mask = __mmask16;
  static constexpr int kWidth = 16;
  static constexpr int kTileRows = 8;
  __m512 v;

  static F32 set(float x) { return {_mm512_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32 load(const bf16* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
  }
  static F32 load(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static F32 load(const byte* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
#ifdef __AVX512BF16__
  void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v)); }
#else
  void store(bf16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
#endif
  void store(fp16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
inline F32 round(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 fraction(F32 a) {  // a - round(a); 0 for infinities
  return {_mm512_reduce_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline F32 scale_by_power(F32 a, F32 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline F32::Mask less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline F32::Mask equal(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline F32 select(F32::Mask m, F32 yes, F32 no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
inline bool any(__mmask16 m) { return m != 0; }
inline bool all(__mmask16 m) { return m == 0xffff; }

inline void transpose(F32 (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m512 u[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 16
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + 2 + j]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // u[4 g + c] holds, in lane block l, column 4 l + c of rows 4 g .. 4 g + 3.
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    const __m512 low01 = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88),
                 high01 = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
    const __m512 low23 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
    const __m512 high23 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    r[c].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
    r[8 + c].v = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    r[4 + c].v = _mm512_shuffle_f32x4(high01, high23, 0x88);
    r[12 + c].v = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
}

// Half the vectors: each pair's lanes are added up while they are brought side by side, which takes half the shuffles
// of a transpose.
inline F32 sum_of_lanes(F32 (&r)[16]) {
  __m512 halves[16], quarters[4];
#pragma GCC unroll 16
  for (int n = 0; n < 8; ++n) {  // 128-bit parts: two of r[i], two of r[i + 4]
    const int i = n % 4 + n / 4 * 8;
    halves[i] =
        _mm512_add_ps(_mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0x44), _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0xee));
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i)  // one each of r[i], r[i + 4], r[i + 8], r[i + 12]
    quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(halves[i], halves[i + 8], 0x88),
                                _mm512_shuffle_f32x4(halves[i], halves[i + 8], 0xdd));
  __m512 pairs[2];
#pragma GCC unroll 16
  for (int i = 0; i < 2; ++i) {
    const __m512 a = quarters[2 * i], b = quarters[2 * i + 1];
    pairs[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  return {_mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88), _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd))};
}

struct F64 {
  using Scalar = double;
  using Mask = __mmask8;
  static constexpr int kWidth = 8;
  static constexpr int kTileRows = 8;
  __m512d v;

  static F64 set(double x) { return {_mm512_set1_pd(x)}; }
  static F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
};

inline F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline F64 max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
inline F64 min(F64 a, F64 b) { return {_mm512_min_pd(a.v, b.v)}; }
inline F64 abs(F64 a) { return {_mm512_abs_pd(a.v)}; }
inline F64 round(F64 a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F64 scale_by_power(F64 a, F64 n) { return {_mm512_scalef_pd(a.v, n.v)}; }
inline F64::Mask less(F64 a, F64 b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ); }
inline F64::Mask equal(F64 a, F64 b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ); }
inline F64 select(F64::Mask m, F64 yes, F64 no) { return {_mm512_mask_blend_pd(m, no.v, yes.v)}; }
inline bool any(__mmask8 m) { return m != 0; }
inline bool all(__mmask8 m) { return m == 0xff; }

inline void transpose(F64 (&r)[8]) {
  __m512d t[8], u[8];
#pragma GCC unroll 16
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_pd(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_pd(r[i].v, r[i + 1].v);
  }
  // t[2 r + c] holds, in lane block l, column 2 l + c of rows 2 r and 2 r + 1.
#pragma GCC unroll 16
  for (int c = 0; c < 2; ++c) {
#pragma GCC unroll 16
    for (int g = 0; g < 2; ++g) {
      u[4 * c + g] = _mm512_shuffle_f64x2(t[4 * g + c], t[4 * g + 2 + c], 0x88);
      u[4 * c + 2 + g] = _mm512_shuffle_f64x2(t[4 * g + c], t[4 * g + 2 + c], 0xdd);
    }
    r[c].v = _mm512_shuffle_f64x2(u[4 * c], u[4 * c + 1], 0x88);
    r[4 + c].v = _mm512_shuffle_f64x2(u[4 * c], u[4 * c + 1], 0xdd);
    r[2 + c].v = _mm512_shuffle_f64x2(u[4 * c + 2], u[4 * c + 3], 0x88);
    r[6 + c].v = _mm512_shuffle_f64x2(u[4 * c + 2], u[4 * c + 3], 0xdd);
  }
}

#ifdef __AVX512BF16__
// Pairs of bfloat16 as 32-bit words, for vdpbf16ps: acc + a.low * b.low + a.high * b.high in every lane.
struct BF16Pairs {
  __m512i v;
  static BF16Pairs load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
  static BF16Pairs broadcast(const uint32_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return {_mm512_set1_epi32(word)};
  }
};
inline F32 dot(BF16Pairs a, BF16Pairs b, F32 acc) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)}; }
// Word i of both together, the low one first, is (even[i], odd[i]), for 32 numbers.
inline void interleave(const bf16* even, const bf16* odd, BF16Pairs& low, BF16Pairs& high) {
  const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  low.v = _mm512_permutex2var_epi16(a, order, b);
  high.v = _mm512_permutex2var_epi16(a, _mm512_add_epi16(order, _mm512_set1_epi16(16)), b);
}
// Word i = (low[i], high[i]), rounded to nearest even.
inline void store_pairs(F32 low, F32 high, uint32_t* p) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);  // 16 of low, then 16 of high
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, both));
}
#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn
