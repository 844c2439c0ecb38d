// The kernels of each architecture, as data. A new architecture is a folder, a row in kernel_table.cpp, and a row in
// native_build.py.
#pragma once

#include <cstddef>

#include "kernel.h"

namespace fastattn {
namespace cuda {

constexpr int kAnyHeadDim = 1 << 30;
constexpr int kNoEnd = 1 << 30;  // of the compute capabilities that run an architecture's kernels

// The kernels of a family for calls of up to head_dim.
struct KernelRow {
  Family family;
  int head_dim;
  Kernel (*get)(DType dtype, bool has_score_mod);
};

class Architecture {
 public:
  template <size_t kRows>
  constexpr Architecture(int capability, int end, bool has_bfloat16, const KernelRow (&kernels)[kRows])
      : capability_(capability),
        capability_end_(end),
        has_bfloat16_(has_bfloat16),
        begin_(kernels),
        end_(kernels + kRows) {}

  // The least compute capability that its kernels run on, times 10.
  int capability() const { return capability_; }

  // Whether a GPU of a compute capability, times 10, runs its kernels. Instructions of one generation alone have an
  // end.
  bool runs_on(int capability) const { return capability_ <= capability && capability < capability_end_; }

  // The largest that its forward pass has kernels for.
  int max_head_dim() const;

  // Whether it has kernels of a family, for a head dimension or at all.
  bool has(Family family, int64_t head_dim = 0) const { return row(family, head_dim) != nullptr; }

  // The kernel of a family for a call. Throws std::invalid_argument if there is none.
  Kernel find(Family family, const Params& p) const;

 private:
  // The family's row for the smallest head dimension that suffices, or null. Rows go upward.
  const KernelRow* row(Family family, int64_t head_dim) const;

  int capability_, capability_end_;
  bool has_bfloat16_;
  const KernelRow *begin_, *end_;
};

// The architecture whose kernels a GPU of a compute capability, times 10, takes: the newest of those that run on it.
const Architecture& architecture_of(int capability);

// The head dimension that a call's kernels must have at least: the larger of its two.
int64_t padded_head_dim(const Params& p);

}  // namespace cuda
}  // namespace fastattn
