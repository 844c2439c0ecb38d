// A operands: 16-row fragments of a tile, in registers, in shared memory, or partly in each.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/shared_memory.h"
#include "../common/static_for.h"
#include "../common/swizzle.h"
#include "../ptx/matrix.h"
#include "../ptx/memory.h"

namespace fastattn {
namespace cuda {

// The A operand of 16 rows and 16 columns.
struct Fragment {
  uint32_t r[4];
};

// kRowTiles times 16 rows of kColumns elements, in registers.
template <int kRowTiles, int kColumns>
struct RegisterOperand {
  Fragment fragments[kRowTiles][kColumns / 16];

  // From the rows that start at `tile`.
  __device__ __forceinline__ void load(uint32_t tile, int lane) {
    const uint32_t at = tile + lane_offset_a<kColumns>(lane);
    static_for<kRowTiles>([&](auto m) {
      static_for<kColumns / 16>([&](auto k) {
        using S = Swizzle<kColumns>;
        ptx::ldmatrix_x4<m * 16 * S::kRowBytes + S::jump(k)>(fragments[m][k].r, at ^ S::flip(k));
      });
    });
  }
  template <int m, int k>
  __device__ __forceinline__ Fragment get() const {
    return fragments[m][k];
  }
};

// The same where registers nearly suffice: each thread keeps its first kInSmem fragments in shared memory. They are kAt
// bytes into the dynamic shared memory, where the rows may have been before, or, kAt < 0, in memory of their own. Only
// one operand of a kernel may have memory of its own. The former needs all threads to load at once.
template <int kRowTiles, int kColumns, int kInSmem, int kThreads, int kAt>
struct SplitOperand {
  static constexpr int kInRegisters = kRowTiles * kColumns / 16 - kInSmem;
  static_assert(kInRegisters >= 0, "no more in shared memory than there are");
  Fragment fragments[kInRegisters > 0 ? kInRegisters : 1];

  __device__ __forceinline__ void load(uint32_t tile, int lane) {
    RegisterOperand<kRowTiles, kColumns> all;
    all.load(tile, lane);
    if (kAt >= 0) __syncthreads();  // all have their rows
    static_for<kColumns / 16>([&](auto k) {
      static_for<kRowTiles>([&](auto m) {
        constexpr int i = k * kRowTiles + m;
        if constexpr (i >= kInSmem) {
          fragments[i - kInSmem] = all.fragments[m][k];
        } else {
          ptx::st_shared_16(smem_operand(i), all.fragments[m][k].r);
        }
      });
    });
  }
  template <int m, int k>
  __device__ __forceinline__ Fragment get() const {
    constexpr int i = k * kRowTiles + m;
    if constexpr (i >= kInSmem) {
      return fragments[i - kInSmem];
    } else {
      Fragment a;
      ptx::ld_shared_16(a.r, smem_operand(i));
      return a;
    }
  }

 private:
  // Where this thread's fragment i is.
  static __device__ __forceinline__ uint32_t smem_operand(int i) {
    if constexpr (kAt >= 0) {
      return shared_address(dynamic_shared_memory()) + kAt + (i * kThreads + threadIdx.x) * 16;
    } else {
      __shared__ uint4 fragments_in_smem[kInSmem][kThreads];
      return shared_address(&fragments_in_smem[i][threadIdx.x]);
    }
  }
};

// The same, loaded from the tile in shared memory each time, where registers do not suffice.
template <int kRowTiles, int kColumns>
struct SmemOperand {
  uint32_t at;

  __device__ __forceinline__ void load(uint32_t tile, int lane) { at = tile + lane_offset_a<kColumns>(lane); }
  template <int m, int k>
  __device__ __forceinline__ Fragment get() const {
    using S = Swizzle<kColumns>;
    Fragment a;
    ptx::ldmatrix_x4<m * 16 * S::kRowBytes + S::jump(k)>(a.r, at ^ S::flip(k));
    return a;
  }
};

// With kInSmem fragments in shared memory.
template <int kRowTiles, int kColumns, int kInSmem, int kThreads, int kAt = -1>
using Operand = std::conditional_t<kInSmem == 0, RegisterOperand<kRowTiles, kColumns>,
                                   SplitOperand<kRowTiles, kColumns, kInSmem, kThreads, kAt>>;

// In registers, except kInSmem fragments, or all in shared memory.
template <bool kInRegisters, int kRowTiles, int kColumns, int kInSmem = 0, int kThreads = 0>
using OperandIn =
    std::conditional_t<kInRegisters, Operand<kRowTiles, kColumns, kInSmem, kThreads>, SmemOperand<kRowTiles, kColumns>>;

}  // namespace cuda
}  // namespace fastattn
