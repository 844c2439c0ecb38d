#include "kernel_table.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../sm75/kernel_table.h"
#include "../sm80/kernel_table.h"

namespace fastattn {
namespace cuda {
namespace {

// From the oldest to the newest: the compute capabilities that run it, times 10, without the last; whether it
// multiplies bfloat16; its kernels. A GPU takes the newest of those that run on it.
constexpr Architecture kArchitectures[] = {
    {75, 80, false, sm75::kKernels},
    {80, kNoEnd, true, sm80::kKernels},
};

// 75 -> "7.5"
std::string dotted(int capability) { return std::to_string(capability / 10) + "." + std::to_string(capability % 10); }

}  // namespace

const KernelRow* Architecture::row(Family family, int64_t head_dim) const {
  const auto found = std::find_if(
      begin_, end_, [&](const KernelRow& row) { return row.family == family && head_dim <= row.head_dim; });
  return found == end_ ? nullptr : found;
}

int Architecture::max_head_dim() const {
  int largest = 0;
  for (const KernelRow* row = begin_; row != end_; ++row)
    if (row->family == Family::kForward) largest = std::max(largest, row->head_dim);
  return largest;
}

Kernel Architecture::find(Family family, const Params& p) const {
  if (p.dtype != DType::kFloat16 && !has_bfloat16_)
    throw std::invalid_argument("compute capability " + dotted(capability_) + " multiplies float16 alone");
  const KernelRow* found = row(family, padded_head_dim(p));
  if (found == nullptr) throw std::invalid_argument("head_dim is above " + std::to_string(max_head_dim()));
  return found->get(p.dtype, p.softcap > 0 || p.alibi.data != nullptr);
}

const Architecture& architecture_of(int capability) {
  const Architecture* found = kArchitectures;
  for (const Architecture& architecture : kArchitectures)
    if (architecture.runs_on(capability)) found = &architecture;
  return *found;
}

int64_t padded_head_dim(const Params& p) { return std::max(p.head_dim, p.head_dim_v); }

}  // namespace cuda
}  // namespace fastattn
