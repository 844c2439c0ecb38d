// Kernels that go through rows and need no tensor cores: for any GPU and head dimension.
#include "../common/element.h"
#include "../host/kernel.h"
#include "bwd_preprocess.h"
#include "kernels.h"

namespace fastattn {
namespace cuda {

using StatisticsBf16 = RowStatisticsTraits<BFloat16>;
using StatisticsFp16 = RowStatisticsTraits<Float16>;

FASTATTN_KERNEL(fastattn_row_statistics_bf16, StatisticsBf16, row_statistics)
FASTATTN_KERNEL(fastattn_row_statistics_fp16, StatisticsFp16, row_statistics)
FASTATTN_KERNEL(fastattn_sink_gradient, SinkGradientTraits, sink_gradient)

Kernel row_statistics_kernel(DType dtype) {
  return dtype == DType::kBFloat16 ? describe<StatisticsBf16>() : describe<StatisticsFp16>();
}

Kernel sink_gradient_kernel() { return describe<SinkGradientTraits>(); }

}  // namespace cuda
}  // namespace fastattn
