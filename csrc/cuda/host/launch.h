// Runs launches on a GPU.
#pragma once

#include <string>

#include "plan.h"

namespace fastattn {
namespace cuda {

// Empty if there is a GPU and a driver for it, else the reason that CUDA gives.
std::string why_unavailable();

// Launches on a stream of a GPU, by its number in this process. Safe while the stream is captured into a graph. Throws
// std::runtime_error with the kernel, how it was launched and what CUDA said.
void run(const Launch& launch, int device, void* stream);

}  // namespace cuda
}  // namespace fastattn
