// Checks the vector types of one instruction set, lane by lane, against plain C++; prints the largest errors of exp2
// and tanh in units in the last place. Exits with the number of failures.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "cpu/simd/math.h"
#include "cpu/tile/gemm.h"

using namespace fastattn::FASTATTN_ISA;

static int failures = 0;
#define EXPECT(condition)                                             \
  if (!(condition)) {                                                 \
    ++failures;                                                       \
    std::printf("line %d: %s does not hold\n", __LINE__, #condition); \
  }

template <class S>
bool same(S a, S b) {
  return a == b || (a != a && b != b);
}

template <class V, class F, class G>
void check_binary(F vector, G plain, const char* name, bool with_nan) {
  using S = typename V::Scalar;
  const S inf = std::numeric_limits<S>::infinity(), nan = std::numeric_limits<S>::quiet_NaN();
  const S values[] = {S(0), S(1), S(-2.5), S(1e-30), S(3e30), inf, -inf, nan};
  for (const S a : values)
    for (const S b : values) {
      if (!with_nan && (a != a || b != b)) continue;
      S out[V::kWidth];
      vector(V::set(a), V::set(b)).store(out);
      for (const S x : out)
        if (!same(x, plain(a, b))) {
          ++failures;
          std::printf("%s(%g, %g) = %g\n", name, double(a), double(b), double(x));
          break;
        }
    }
}

template <class V>
void check_arithmetic() {
  using S = typename V::Scalar;
  check_binary<V>([](V a, V b) { return a + b; }, [](S a, S b) { return a + b; }, "+", true);
  check_binary<V>([](V a, V b) { return a - b; }, [](S a, S b) { return a - b; }, "-", true);
  check_binary<V>([](V a, V b) { return a * b; }, [](S a, S b) { return a * b; }, "*", true);
  check_binary<V>([](V a, V b) { return a / b; }, [](S a, S b) { return a / b; }, "/", true);
  // max and min give the second argument if either is NaN.
  check_binary<V>([](V a, V b) { return max(a, b); }, [](S a, S b) { return a > b ? a : b; }, "max", true);
  check_binary<V>([](V a, V b) { return min(a, b); }, [](S a, S b) { return a < b ? a : b; }, "min", true);
  check_binary<V>([](V a, V b) { return select(less(a, b), a, b); }, [](S a, S b) { return a < b ? a : b; }, "less",
                  true);
  check_binary<V>([](V a, V b) { return select(equal(a, b), a, V::set(S(7))); },
                  [](S a, S b) { return a == b ? a : S(7); }, "equal", true);
  check_binary<V>([](V a, V) { return abs(a); }, [](S a, S) { return std::fabs(a); }, "abs", true);
  check_binary<V>([](V a, V b) { return fma(a, b, V::set(S(3))); }, [](S a, S b) { return std::fma(a, b, S(3)); },
                  "fma", false);
  for (const double x : {0.5, 1.5, 2.5, -0.5, -1.5, 1.49, 1e6}) {
    S out[V::kWidth];
    round(V::set(S(x))).store(out);
    EXPECT(out[0] == S(std::nearbyint(x)));
  }
}

template <class V>
void check_transpose() {
  using S = typename V::Scalar;
  V rows[V::kWidth];
  for (int i = 0; i < V::kWidth; ++i) {
    S row[V::kWidth];
    for (int j = 0; j < V::kWidth; ++j) row[j] = S(i * V::kWidth + j);
    rows[i] = V::load(row);
  }
  transpose(rows);
  for (int i = 0; i < V::kWidth; ++i) {
    S row[V::kWidth];
    rows[i].store(row);
    for (int j = 0; j < V::kWidth; ++j) EXPECT(row[j] == S(j * V::kWidth + i));
  }
  S sums[V::kWidth];
  sum_of_lanes(rows).store(sums);
  for (int i = 0; i < V::kWidth; ++i)
    EXPECT(sums[i] == S(V::kWidth * (V::kWidth * (V::kWidth - 1) / 2) + V::kWidth * i));
}

template <class V>
double ulps(typename V::Scalar found, long double exact) {
  using S = typename V::Scalar;
  const S nearest = S(exact);
  const S unit = std::nextafter(std::fabs(nearest), std::numeric_limits<S>::infinity()) - std::fabs(nearest);
  return double(std::fabs((long double)(found)-exact) / unit);
}

template <class V>
void check_functions(const char* type, double exp2_allowance, double tanh_allowance) {
  using S = typename V::Scalar;
  double worst_exp2 = 0, worst_tanh = 0;
  std::mt19937_64 random(1);
  for (int i = 0; i < 400000; ++i) {
    const S x = S(std::uniform_real_distribution<double>(-120, 20)(random)),
            y = S(std::uniform_real_distribution<double>(-12, 12)(random));
    S out[V::kWidth];
    exp2(V::set(x)).store(out);
    worst_exp2 = std::fmax(worst_exp2, ulps<V>(out[V::kWidth - 1], std::exp2((long double)(x))));
    tanh(V::set(y)).store(out);
    worst_tanh = std::fmax(worst_tanh, ulps<V>(out[0], std::tanh((long double)(y))));
  }
  std::printf("%s: exp2 %.2f ulp, tanh %.2f ulp\n", type, worst_exp2, worst_tanh);
  EXPECT(worst_exp2 <= exp2_allowance);
  EXPECT(worst_tanh <= tanh_allowance);
  const S inf = std::numeric_limits<S>::infinity(), nan = std::numeric_limits<S>::quiet_NaN();
  S out[V::kWidth];
  exp2(V::set(-inf)).store(out);
  EXPECT(out[0] == S(0));
  exp2(V::set(S(-5000))).store(out);
  EXPECT(out[0] == S(0));
  exp2(V::set(inf)).store(out);
  EXPECT(out[0] == inf);
  exp2(V::set(nan)).store(out);
  EXPECT(out[0] != out[0]);
  exp2(V::set(S(0))).store(out);
  EXPECT(out[0] == S(1));  // exactly: it rescales every finished block
  tanh(V::set(inf)).store(out);
  EXPECT(out[0] == S(1));
  tanh(V::set(-inf)).store(out);
  EXPECT(out[0] == S(-1));
  tanh(V::set(nan)).store(out);
  EXPECT(out[0] != out[0]);
}

// Every bit pattern through load, and back through store; and rounding between neighbours.
template <class T>
void check_half(bool exact_subnormals) {
  for (uint32_t bits = 0; bits < 65536; bits += F32::kWidth) {
    T in[F32::kWidth], back[F32::kWidth];
    float wide[F32::kWidth];
    for (int i = 0; i < F32::kWidth; ++i) in[i].bits = uint16_t(bits + uint32_t(i));
    F32::load(in).store(wide);
    F32::load(wide).store(back);
    for (int i = 0; i < F32::kWidth; ++i) {
      const float expected = to_float(in[i]);
      const bool tiny = std::fabs(wide[i]) < 1.1754944e-38f;
      EXPECT(same(wide[i], expected));
      EXPECT(expected != expected ? to_float(back[i]) != to_float(back[i])
                                  : back[i].bits == in[i].bits || (tiny && !exact_subnormals));
    }
  }
  std::mt19937 random(2);
  for (int n = 0; n < 100000; ++n) {
    const float x = bits_to_float(uint32_t(random()));
    if (std::fabs(x) < 1e-30f) continue;
    T expected, found[F32::kWidth];
    from_float(x, expected);
    F32::set(x).store(found);
    EXPECT(x != x || found[0].bits == expected.bits);
  }
}

void check_bytes() {
  byte in[F32::kWidth];
  float out[F32::kWidth];
  for (int i = 0; i < F32::kWidth; ++i) in[i].bits = uint8_t(255 - i);
  F32::load(in).store(out);
  for (int i = 0; i < F32::kWidth; ++i) EXPECT(out[i] == float(255 - i));
}

// any and all with one lane that differs from the others, wherever it is.
template <class V>
void check_tests() {
  using S = typename V::Scalar;
  const V zero = V::set(S(0)), one = V::set(S(1));
  EXPECT(all(equal(zero, zero)) && any(equal(zero, zero)) && !any(equal(zero, one)) && !all(equal(zero, one)));
  for (int i = 0; i < V::kWidth; ++i) {
    S x[V::kWidth] = {};
    x[i] = S(1);
    EXPECT(any(equal(V::load(x), one)) && !all(equal(V::load(x), one)));
    EXPECT(any(equal(V::load(x), zero)) && !all(equal(V::load(x), zero)));
  }
}

template <class E>
void check_gemm() {
  using S = typename E::Scalar;
  using Tiles = ColumnTiles<E>;
  constexpr int kLanes = kLanesOf<typename E::Vector>, kMost = 29, kSize = 2000;
  S a[kSize], b[40 * kLanes], c[kMost * kLanes], alpha[kLanes];
  std::mt19937 random(3);
  auto fill = [&](S* x, int n) {
    for (int i = 0; i < n; ++i) x[i] = S(int(random() % 17) - 8);
  };
  // A as rows (no columns), and as columns that lie in rows of a matrix or in tiles of their own.
  const Tiles in_rows = Tiles::of_rows(a, kMost), in_tiles = {a, Tiles::kRows, 40 * Tiles::kRows + 5};
  for (int rows = 1; rows <= kMost; ++rows) {
    for (const int k : {0, 1, 7, 40}) {
      for (const Tiles* columns : {static_cast<const Tiles*>(nullptr), &in_rows, &in_tiles}) {
        fill(a, kSize);
        fill(b, 40 * kLanes);
        fill(c, kMost * kLanes);
        fill(alpha, kLanes);
        S expected[kMost * kLanes];
        for (int r = 0; r < rows; ++r)
          for (int l = 0; l < kLanes; ++l) {
            expected[r * kLanes + l] = alpha[l] * c[r * kLanes + l];
            for (int i = 0; i < k; ++i)
              expected[r * kLanes + l] += (columns ? *columns->at(r, i) : a[r * 40 + i]) * b[i * kLanes + l];
          }
        if (columns) {
          gemm_columns<E, 2, Update::kScaleAdd>(rows, k, *columns, b, c, alpha);
        } else {
          gemm<E, 2, Update::kScaleAdd>(rows, k, a, 40, b, c, alpha);
        }
        for (int i = 0; i < rows * kLanes; ++i) EXPECT(c[i] == expected[i]);  // small integers: exact
      }
    }
  }
}

int main() {
  check_arithmetic<F32>();
  check_arithmetic<F64>();
  check_bytes();
  check_tests<F32>();
  check_tests<F64>();
  check_transpose<F32>();
  check_transpose<F64>();
  check_functions<F32>("float", 2.5, 4.0);
  check_functions<F64>("double", 1.5, 16.0);
#ifdef __AVX512BF16__
  check_half<bf16>(false);  // the processor's own conversion flushes subnormal numbers
#else
  check_half<bf16>(true);
#endif
  check_half<fp16>(true);
  check_gemm<Single<F32>>();
  check_gemm<Single<F64>>();
  std::printf("%d failures\n", failures);
  return failures < 100 ? failures : 100;
}
