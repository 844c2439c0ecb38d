// Which kernels there are for compute capability 8.0 and up. Their tile sizes are in config.h.
#pragma once

#include "../host/kernel_table.h"
#include "kernels.h"

namespace fastattn {
namespace cuda {
namespace sm80 {

constexpr KernelRow kKernels[] = {
    {Family::kForward, 32, kernel<Family::kForward, 32>},
    {Family::kForward, 64, kernel<Family::kForward, 64>},
    {Family::kForward, 96, kernel<Family::kForward, 96>},
    {Family::kForward, 128, kernel<Family::kForward, 128>},
    {Family::kForward, 192, kernel<Family::kForward, 192>},
    {Family::kForward, 256, kernel<Family::kForward, 256>},

    {Family::kDecode, 32, kernel<Family::kDecode, 32>},
    {Family::kDecode, 64, kernel<Family::kDecode, 64>},
    {Family::kDecode, 96, kernel<Family::kDecode, 96>},
    {Family::kDecode, 128, kernel<Family::kDecode, 128>},
    {Family::kDecode, 192, kernel<Family::kDecode, 192>},
    {Family::kDecode, 256, kernel<Family::kDecode, 256>},

    {Family::kBwdDq, 32, kernel<Family::kBwdDq, 32>},
    {Family::kBwdDq, 64, kernel<Family::kBwdDq, 64>},
    {Family::kBwdDq, 96, kernel<Family::kBwdDq, 96>},
    {Family::kBwdDq, 128, kernel<Family::kBwdDq, 128>},
    {Family::kBwdDq, 192, kernel<Family::kBwdDq, 192>},
    {Family::kBwdDq, 256, kernel<Family::kBwdDq, 256>},

    // Registers hold the sums of both gradients up to head_dim 128.
    {Family::kBwdDkdv, 32, kernel<Family::kBwdDkdv, 32>},
    {Family::kBwdDkdv, 64, kernel<Family::kBwdDkdv, 64>},
    {Family::kBwdDkdv, 96, kernel<Family::kBwdDkdv, 96>},
    {Family::kBwdDkdv, 128, kernel<Family::kBwdDkdv, 128>},
    {Family::kBwdDk, 192, kernel<Family::kBwdDk, 192>},
    {Family::kBwdDk, 256, kernel<Family::kBwdDk, 256>},
    {Family::kBwdDv, 192, kernel<Family::kBwdDv, 192>},
    {Family::kBwdDv, 256, kernel<Family::kBwdDv, 256>},

    {Family::kAppendKv, kAnyHeadDim, append_kv_kernel},
    {Family::kCombine, kAnyHeadDim, combine_kernel},
};

}  // namespace sm80
}  // namespace cuda
}  // namespace fastattn
