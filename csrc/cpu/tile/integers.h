// Small arithmetic on sizes, and integers that the compiler knows.
#pragma once

#include <cstdint>

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// An argument whose type holds its value, for generic lambdas.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
