// What hides a score: causal masks, windows and lengths. One type owns which columns a row sees, which columns a tile
// visits, and hiding within a tile. Another kind of mask is another class with the same functions.
#pragma once

#include "../../call/params.h"

namespace fastattn {
namespace cuda {

constexpr int kOpen = 1 << 29;  // a side of a window that ends nowhere; positions stay below 1 << 28

// Forward, bwd_dq and decode have queries as rows and keys as columns; bwd_dkdv has keys as rows and queries as
// columns.
enum class Rows { kQueries, kKeys };

// The columns of a tile of rows: some row sees each of [n_begin, n_end), all rows see those of [full_begin, full_end).
// A block of columns within the latter is a full block; the others are masked blocks.
struct ColumnRange {
  int n_begin, n_end, full_begin, full_end;
};

// The steps of a masked block that a warp takes, and the columns that all of its rows see.
struct MaskedSteps {
  int begin, end, full_begin, full_end;
};

// Which sides of a step may hide something from some row.
struct Sides {
  bool left, right;
};

// Of one sequence. `seqlen_q` below is its number of queries; only rows that are keys need it.
struct Mask {
  static constexpr int kStep = 16;  // columns of a step: two 16 x 8 products

  int diagonal_offset, left, right, seqlen_k;

  Mask() = default;
  __device__ __forceinline__ Mask(const Params& p, const Sequence& s)
      : diagonal_offset(static_cast<int>(s.offset)),
        left(p.window_left < 0 || p.window_left > kOpen ? kOpen : static_cast<int>(p.window_left)),
        right(p.window_right < 0 || p.window_right > kOpen ? kOpen : static_cast<int>(p.window_right)),
        seqlen_k(static_cast<int>(s.k_length)) {}

  // A row sees the columns [begin(row), end(row)).
  template <Rows kRows>
  __device__ __forceinline__ int begin(int row) const {
    if constexpr (kRows == Rows::kQueries) {
      return max(row + diagonal_offset - left, 0);
    } else {
      return max(row - diagonal_offset - right, 0);
    }
  }
  template <Rows kRows>
  __device__ __forceinline__ int end(int row, int seqlen_q) const {
    if constexpr (kRows == Rows::kQueries) {
      return min(row + diagonal_offset + right + 1, seqlen_k);
    } else {
      return min(row - diagonal_offset + left + 1, seqlen_q);
    }
  }

  // Of rows [first_row, last_row].
  template <Rows kRows>
  __device__ __forceinline__ ColumnRange columns(int first_row, int last_row, int seqlen_q) const {
    return {begin<kRows>(first_row), end<kRows>(last_row, seqlen_q), begin<kRows>(last_row),
            end<kRows>(first_row, seqlen_q)};
  }

  // Of the block of kColumns columns from `column` on, for a warp's rows [first_row, last_row].
  template <Rows kRows, int kColumns>
  __device__ __forceinline__ MaskedSteps steps(int first_row, int last_row, int column, int seqlen_q) const {
    const int full_begin = begin<kRows>(last_row), full_end = end<kRows>(first_row, seqlen_q);
    const int first = max(begin<kRows>(first_row) - column, 0) / kStep;
    const int past_last = min((end<kRows>(last_row, seqlen_q) - column + kStep - 1) / kStep, kColumns / kStep);
    return {first, past_last, full_begin, full_end};
  }

  // Of the step that starts at `column`.
  static __device__ __forceinline__ Sides sides(const MaskedSteps& steps, int column) {
    return {(column < steps.full_begin), (column + kStep > steps.full_end)};
  }

  // Gives `value` to an element if its row does not see its column.
  template <Rows kRows>
  __device__ __forceinline__ void hide(float& x, int row, int column, int seqlen_q, float value) const {
    if (column < begin<kRows>(row) || column >= end<kRows>(row, seqlen_q)) x = value;
  }

  // The same for two 16 x 8 products. row(m, r): this lane's rows of 16-row tile m, r = 0 and 1. `column`: this lane's
  // first column.
  template <Rows kRows, int kRowTiles, class RowOf>
  __device__ __forceinline__ void hide(float (&x)[kRowTiles][2][4], Sides sides, const RowOf& row, int column,
                                       int seqlen_q, float value) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (sides.right) {
          const int from = end<kRows>(row(m, r), seqlen_q) - column;
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (i / 2 * 8 + i % 2 >= from) x[m][i / 2][2 * r + i % 2] = value;
        }
        if (sides.left) {
          const int to = begin<kRows>(row(m, r)) - column;
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (i / 2 * 8 + i % 2 < to) x[m][i / 2][2 * r + i % 2] = value;
        }
      }
  }
};

}  // namespace cuda
}  // namespace fastattn
