// Hides what the rows of a warp do not see.
#pragma once

namespace fastattn {
namespace cuda {

// Gives elements of two 16 x 8 products a value of their own: where `left`, those in columns before first(m, r), and
// where `right`, those in columns from end(m, r) on; r = 0 and 1 are this lane's rows of 16-row tile m. Columns count
// from this lane's first one.
template <int kRowTiles, class First, class End>
__device__ __forceinline__ void hide(float (&x)[kRowTiles][2][4], bool left, bool right, const First& first,
                                     const End& end, float value) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (right) {
        const int from = end(m, r);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i / 2 * 8 + i % 2 >= from) x[m][i / 2][2 * r + i % 2] = value;
      }
      if (left) {
        const int to = first(m, r);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i / 2 * 8 + i % 2 < to) x[m][i / 2][2 * r + i % 2] = value;
      }
    }
}

}  // namespace cuda
}  // namespace fastattn
