// Bringing rows of the caller's tensors into the order and the words that the matrix product reads, and back.
#pragma once

#include "gemm.h"
#include "integers.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Words that hold so many numbers.
inline int words_of(int numbers, int per_word) { return (numbers + per_word - 1) / per_word; }

// The first `left` of `size` numbers, and zeros after them. Out of line, to keep it out of the callers' registers; but
// a call while sums are in registers spills them all.
template <class T>
__attribute__((noinline)) void copy_padded(const T* from, int left, int size, T* to) {
  for (int i = 0; i < size; ++i) to[i] = i < left ? from[i] : T{};
}

template <class V, class T>
V load_copy(const T* from, int left) {
  T values[V::kWidth];
  copy_padded(from, left, V::kWidth, values);
  return V::load(values);
}

// kWidth numbers of a row of which `left` exist; the others are zero and are not read.
template <class V, class T>
inline V load_padded(const T* from, int left) {
  return left >= V::kWidth ? V::load(from) : load_copy<V>(from, left);
}

// n numbers of a row as the vector's scalars.
template <class V, class T>
void copy_row(const T* from, int64_t stride, int n, typename V::Scalar* to) {
  int i = 0;
  if (stride == 1) {
    for (; i + V::kWidth <= n; i += V::kWidth) V::load(from + i).store(to + i);
  }
  for (; i < n; ++i) to[i] = typename V::Scalar(to_float(from[i * stride]));
}

template <class V, class T>
void store_row(const typename V::Scalar* from, int n, T* to, int64_t stride) {
  int i = 0;
  if (stride == 1) {
    for (; i + V::kWidth <= n; i += V::kWidth) V::load(from + i).store(to + i);
  }
  for (; i < n; ++i) from_float(from[i], to[i * stride]);
}

// The first `columns` numbers of a vector.
template <class V, class T>
void store_partial(V x, int columns, T* to, int64_t stride) {
  if (columns == V::kWidth && stride == 1) {
    x.store(to);
    return;
  }
  typename V::Scalar values[V::kWidth];
  x.store(values);
  store_row<V>(values, columns, to, stride);
}

// rows[i][d * stride] = lane i of column(d), for d < dim and the first `count` lanes of a vector.
template <class V, class T, class Column>
inline void store_columns(int dim, int count, Column column, T* const* rows, int64_t stride) {
  constexpr int kWidth = V::kWidth;
  int d = 0;
  if (count == kWidth && stride == 1) {
    for (; d + kWidth <= dim; d += kWidth) {  // loops unrolled, so that the tile stays in registers
      V tile[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) tile[i] = column(d + i);
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) tile[i].store(rows[i] + d);
    }
  }
  for (; d < dim; d += kWidth) {
    const int columns = dim - d < kWidth ? dim - d : kWidth;
    V tile[kWidth];
    for (int i = 0; i < kWidth; ++i) tile[i] = i < columns ? column(d + i) : V::set(0);
    transpose(tile);
    for (int i = 0; i < count; ++i) store_partial(tile[i], columns, rows[i] + d * stride, stride);
  }
}

// f(n, values) for the keys n < keys of kWidth rows of a bias or mask, `values` being a key's in all rows. at: where
// the rows begin. Whole tiles are read along the keys and transposed, so that no line is touched twice.
template <class V, class T, class F>
inline void for_each_key(const T* from, const int64_t* at, int64_t key_stride, int keys, F f) {
  using S = typename V::Scalar;
  constexpr int kWidth = V::kWidth;
  int n = 0;
  if constexpr (sizeof(S) == 8 ? sizeof(T) == 8 : sizeof(T) <= 4) {  // what the vector can load
    for (; key_stride == 1 && n + kWidth <= keys; n += kWidth) {
      V tile[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) tile[i] = V::load(from + at[i] + n);
      transpose(tile);
#pragma GCC unroll 16
      for (int t = 0; t < kWidth; ++t) f(n + t, tile[t]);
    }
  }
  for (; n < keys; ++n) {
    S values[kWidth];
    for (int i = 0; i < kWidth; ++i) values[i] = S(to_float(from[at[i] + n * key_stride]));
    f(n, V::load(values));
  }
}

// words[w][lane] = word w of rows[lane], in tiles of kWidth words and lanes; a null row gives zeros. load(row, w) gives
// words w .. w + kWidth of a row. Returns the words done, which are all but the last few.
template <class V, class T, class Load>
inline int pack_tiles(const T* const* rows, int lanes, int row_words, Load load, typename V::Scalar* words,
                      int64_t ld) {
  constexpr int kWidth = V::kWidth;
  const int whole = row_words / kWidth * kWidth;
  for (int lane = 0; lane < lanes; lane += kWidth) {
    bool all_there = true;
    for (int i = 0; i < kWidth; ++i) all_there = all_there && rows[lane + i] != nullptr;
    for (int w = 0; w < whole; w += kWidth) {
      V tile[kWidth];
      if (all_there) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) tile[i] = load(rows[lane + i], w);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) tile[i] = rows[lane + i] ? load(rows[lane + i], w) : V::set(0);
      }
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) tile[i].store(words + (w + i) * ld + lane);
    }
  }
  return whole;
}

// Columns: words[word][lane], word w of lane l holding the numbers w * kPerWord .. of rows[l]: Q^T and dO^T.
// A null row gives zeros.
template <class E, class T>
struct Columns;

template <class V, class T>
struct Columns<Single<V>, T> {
  static void pack(const T* const* rows, int lanes, int64_t stride, int dim, typename V::Scalar* words, int64_t ld) {
    using S = typename V::Scalar;
    int d = 0;
    if (stride == 1)
      d = pack_tiles<V>(rows, lanes, dim, [](const T* row, int w) { return V::load(row + w); }, words, ld);
    for (; d < dim; ++d)
      for (int lane = 0; lane < lanes; ++lane)
        words[d * ld + lane] = rows[lane] ? S(to_float(rows[lane][d * stride])) : S(0);
  }
};

#ifdef __AVX512BF16__
template <>
struct Columns<Pairs, bf16> {
  // A pair of bfloat16 is as wide as a float, and a transpose only moves words.
  static void pack(const bf16* const* rows, int lanes, int64_t stride, int dim, uint32_t* words, int64_t ld) {
    int w = 0;
    if (stride == 1)
      w = pack_tiles<F32>(
          rows, lanes, dim / 2,
          [](const bf16* row, int w) { return F32{_mm512_castsi512_ps(_mm512_loadu_si512(row + 2 * w))}; },
          reinterpret_cast<float*>(words), ld);
    for (int d = 2 * w; d < dim; d += 2)
      for (int lane = 0; lane < lanes; ++lane) {
        const bf16* row = rows[lane];
        const uint32_t low = row ? row[d * stride].bits : 0, high = row && d + 1 < dim ? row[(d + 1) * stride].bits : 0;
        words[d / 2 * ld + lane] = low | high << 16;
      }
  }
};

// Rows r and r + 1 interleaved: word i = (even[i], odd[i]); a null row gives zeros.
inline void interleave_rows(const bf16* even, int64_t stride, const bf16* odd, int dim, uint32_t* words) {
  int d = 0;
  if (stride == 1) {
    for (; d + 16 <= dim; d += 16) {
      const __m512i low =
          even ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(even + d))) : _mm512_setzero_si512();
      const __m512i high =
          odd ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(odd + d))) : _mm512_setzero_si512();
      _mm512_storeu_si512(words + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
  for (; d < dim; ++d) words[d] = (even ? even[d * stride].bits : 0u) | (odd ? odd[d * stride].bits : 0u) << 16;
}

// dim numbers as pairs along the row, padded with zero.
inline void pair_row(const bf16* row, int64_t stride, int dim, uint32_t* words) {
  if (stride == 1 && dim % 2 == 0) {
    std::memcpy(words, row, size_t(dim) * 2);
    return;
  }
  for (int d = 0; d < dim; d += 2)
    words[d / 2] = row[d * stride].bits | uint32_t(d + 1 < dim ? row[(d + 1) * stride].bits : 0) << 16;
}
#endif

// At most kLanes numbers from column d on of each row, as [word of lanes][kLanes]; zeros after the last that exists, up
// to whole vectors. A null row gives zeros.
template <class V, class T>
void pack_rows(Single<V>, const T* const* rows, int lanes, int64_t stride, int d, int columns,
               typename V::Scalar* words) {
  constexpr int kLanes = kLanesOf<V>;
  for (int lane = 0; lane < lanes; ++lane, words += kLanes) {
    int i = 0;
    if (rows[lane] != nullptr) {
      copy_row<V>(rows[lane] + d * stride, stride, columns, words);
      i = columns;
    }
    for (; i < round_up(columns, V::kWidth); ++i) words[i] = typename V::Scalar(0);
  }
}

#ifdef __AVX512BF16__
inline void pack_rows(Pairs, const bf16* const* rows, int lanes, int64_t stride, int d, int columns, uint32_t* words) {
  auto from = [&](int lane) { return rows[lane] ? rows[lane] + d * stride : nullptr; };
  for (int lane = 0; lane < lanes; lane += 2, words += kLanesOf<F32>) {
    interleave_rows(from(lane), stride, from(lane + 1), columns, words);
    for (int i = columns; i < round_up(columns, F32::kWidth); ++i) words[i] = 0;
  }
}
#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn
