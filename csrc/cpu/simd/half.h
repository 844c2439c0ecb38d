// bfloat16 and float16 as storage: two bytes each, converted in software where the processor has no instruction.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastattn {
namespace FASTATTN_ISA {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct byte {  // of a boolean mask: 0 is False
  uint8_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(byte x) { return float(x.bits); }
inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

inline float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, fraction = x.bits & 1023u;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24
    const float magnitude = float(fraction) * 5.9604644775390625e-8f;
    return bits_to_float(float_to_bits(magnitude) | sign);
  }
  return bits_to_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}

inline void from_float(float x, float& y) { y = x; }
inline void from_float(double x, double& y) { y = x; }

// Round to nearest, ties to even; NaN stays NaN.
inline void from_float(float x, bf16& y) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    y.bits = uint16_t((bits >> 16) | 0x40u);
  } else {
    y.bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

inline void from_float(float x, fp16& y) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    y.bits = uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  } else if (magnitude >= 0x47800000u) {  // at least 2^16: infinity
    y.bits = uint16_t(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the sum aligns the fraction to multiples of 2^-24 and rounds it
    y.bits = uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
  } else {
    y.bits = uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
