// The vector types of the instruction set this file is compiled for.
//
// F32 and F64 hold kWidth floats or doubles. They have:
//   * set (broadcast), load and store (unaligned; F32 also from and to bf16 and fp16, rounded to nearest even, and from
//     byte);
//   * + - * /, fma(a, b, c) = a * b + c, abs, round (to nearest integer), less, equal, select, any, all;
//   * scale_by_power(a, n) = a * 2^n for integral n, 0 if that is far below the smallest number;
//   * max and min, which return their second argument if either is NaN: where NaN must survive, it comes second;
//   * transpose of a kWidth x kWidth tile.
// kTileRows is the number of rows that a matrix tile keeps in registers.
#pragma once

#define FASTATTN_SCALAR 0
#define FASTATTN_AVX2 1
#define FASTATTN_AVX512 2

#if FASTATTN_SIMD == FASTATTN_AVX512
#include "avx512.h"
#elif FASTATTN_SIMD == FASTATTN_AVX2
#include "avx2.h"
#else
#include "scalar.h"
#endif
