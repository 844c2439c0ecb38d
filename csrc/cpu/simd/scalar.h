// No instruction set assumed beyond the compiler's baseline: short arrays that it may vectorise as it likes.
// See simd.h for the meaning of the operations.
#pragma once

#include <cmath>

#include "half.h"

namespace fastattn {
namespace FASTATTN_ISA {

// 2^n as the bits of a float or double; n of -127 (-1023) and below gives 0.
inline float power_of_two(float n) {
  const int biased = n >= -127.0f ? int(n) + 127 : 0;
  return bits_to_float(uint32_t(biased) << 23);
}
inline double power_of_two(double n) {
  const uint64_t bits = (n >= -1023.0 ? uint64_t(int(n) + 1023) : 0) << 52;
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

template <class S, int W>
struct Lanes {
  using Scalar = S;
  struct Mask {
    bool m[W];
  };
  static constexpr int kWidth = W;
  static constexpr int kTileRows = 4;
  S v[W];

  static Lanes set(S x) {
    Lanes r;
    for (int i = 0; i < W; ++i) r.v[i] = x;
    return r;
  }
  template <class T>
  static Lanes load(const T* p) {
    Lanes r;
    for (int i = 0; i < W; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < W; ++i) from_float(v[i], p[i]);
  }
  template <class F>
  static Lanes each(F f) {
    Lanes r;
    for (int i = 0; i < W; ++i) r.v[i] = f(i);
    return r;
  }
  template <class F>
  static Mask test(F f) {
    Mask r;
    for (int i = 0; i < W; ++i) r.m[i] = f(i);
    return r;
  }

  friend Lanes operator+(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend Lanes operator-(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend Lanes operator*(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend Lanes operator/(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  friend Lanes fma(Lanes a, Lanes b, Lanes c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  friend Lanes max(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  friend Lanes min(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  friend Lanes abs(Lanes a) {
    return each([&](int i) { return std::fabs(a.v[i]); });
  }
  friend Lanes round(Lanes a) {
    return each([&](int i) { return std::nearbyint(a.v[i]); });
  }
  friend Lanes scale_by_power(Lanes a, Lanes n) {
    return each([&](int i) { return a.v[i] * power_of_two(n.v[i]); });
  }
  friend Mask less(Lanes a, Lanes b) {
    return test([&](int i) { return a.v[i] < b.v[i]; });
  }
  friend Mask equal(Lanes a, Lanes b) {
    return test([&](int i) { return a.v[i] == b.v[i]; });
  }
  friend Mask operator|(Mask a, Mask b) {
    return test([&](int i) { return a.m[i] || b.m[i]; });
  }
  friend Lanes select(Mask m, Lanes a, Lanes b) {
    return each([&](int i) { return m.m[i] ? a.v[i] : b.v[i]; });
  }
  friend bool any(Mask m) {
    bool r = false;
    for (int i = 0; i < W; ++i) r = r || m.m[i];
    return r;
  }
  friend bool all(Mask m) {
    bool r = true;
    for (int i = 0; i < W; ++i) r = r && m.m[i];
    return r;
  }
  friend void transpose(Lanes (&r)[W]) {
    for (int i = 0; i < W; ++i)
      for (int j = 0; j < i; ++j) {
        const S x = r[i].v[j];
        r[i].v[j] = r[j].v[i];
        r[j].v[i] = x;
      }
  }
};

using F32 = Lanes<float, 4>;
using F64 = Lanes<double, 2>;

}  // namespace FASTATTN_ISA
}  // namespace fastattn
