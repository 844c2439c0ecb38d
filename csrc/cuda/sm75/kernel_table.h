// Which kernels there are for compute capability 7.5. Their tile sizes are in config.h.
#pragma once

#include "../host/kernel_table.h"
#include "kernels.h"

namespace fastattn {
namespace cuda {
namespace sm75 {

constexpr KernelRow kKernels[] = {
    {Family::kForward, 64, kernel<Family::kForward, 64>},
    {Family::kForward, 128, kernel<Family::kForward, 128>},

    {Family::kBwdDq, 64, kernel<Family::kBwdDq, 64>},
    {Family::kBwdDq, 128, kernel<Family::kBwdDq, 128>},

    // Registers hold the sums of both gradients at head_dim 64.
    {Family::kBwdDkdv, 64, kernel<Family::kBwdDkdv, 64>},
    {Family::kBwdDk, 128, kernel<Family::kBwdDk, 128>},
    {Family::kBwdDv, 128, kernel<Family::kBwdDv, 128>},
};

}  // namespace sm75
}  // namespace cuda
}  // namespace fastattn
