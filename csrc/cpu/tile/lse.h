// The logarithm of a softmax's denominator, as a number and its rounding error.
//
// Probabilities are recomputed from it, so its absolute error is their relative one: at scores of 7e4 a float alone is
// off by up to 0.004. The rounding error is kept beside it (see lse_residual).
#pragma once

namespace fastattn {
namespace FASTATTN_ISA {

constexpr double kLog2E = 1.4426950408889634;

inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }

// A number as the sum of two: the nearest one, and its rounding error.
template <class S>
struct Twofold {
  S high, low;
};

inline float exact_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double exact_fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

// x * factor. Without a second part where it is not finite.
template <class S>
inline Twofold<S> times(Twofold<S> x, Twofold<S> factor) {
  const S high = x.high * factor.high, low = exact_fma(x.high, factor.high, -high);
  if (high - high != S(0)) return {high, S(0)};
  return {high, low + (x.high * factor.low + x.low * factor.high)};
}

// x / divisor, likewise.
template <class S>
inline Twofold<S> over(Twofold<S> x, Twofold<S> divisor) {
  const S high = x.high / divisor.high;
  if (high - high != S(0)) return {high, S(0)};
  const S rest = exact_fma(-high, divisor.high, x.high);
  return {high, ((rest + x.low) - high * divisor.low) / divisor.high};
}

// The unit in which a kernel keeps scores: what makes them exponents of 2, and how much it is in natural units. Scores
// are subtracted before they are scaled, so that equal ones cancel, however large.
template <class S>
struct Unit {
  S exponent;
  Twofold<S> natural;
};
template <class S>
inline Unit<S> unit_of_products(double scale) {
  return {S(scale * kLog2E), {S(scale), S(scale - double(S(scale)))}};
}
template <class S>
inline Unit<S> natural_unit() {
  return {S(kLog2E), {S(1), S(0)}};
}

// a + b, exactly.
template <class S>
inline Twofold<S> sum(S a, S b) {
  const S high = a + b;
  if (high - high != S(0)) return {high, S(0)};
  const S added = high - a;
  return {high, (a - (high - added)) + (b - added)};
}

// lse, from the maximum of the scores and the sum of the exponentials relative to it.
template <class S>
inline Twofold<S> log_sum(const Unit<S>& unit, S row_max, S row_sum) {
  const Twofold<S> base = times(Twofold<S>{row_max, S(0)}, unit.natural), lse = sum(base.high, log_of(row_sum));
  return {lse.high, lse.low + base.low};
}

// Adds a sink to lse; returns the probability that is left to everything else. A row that saw nothing, whose lse is
// -inf, is all sink.
template <class S>
inline S add_sink(S sink, Twofold<S>& lse) {
  if (lse.high == S(-__builtin_inf())) {
    lse.high = sink;
    return S(0);
  }
  if (sink == S(-__builtin_inf())) return S(1);
  const S top = sink > lse.high ? sink : lse.high;
  const double own = __builtin_exp(double(lse.high - top) + double(lse.low)), sinks = __builtin_exp(double(sink - top));
  lse = sum(top, S(__builtin_log(own + sinks)));
  return S(own / (own + sinks));
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
