// Runs launches on a GPU.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan.h"

namespace fastattn {
namespace cuda {

// Empty if there is a GPU and a driver for it, else what CUDA says is missing.
std::string why_unavailable();

// What plans need to know of a GPU, by its number in this process.
Device device_of(int index);

// Launches on a stream of a GPU, one after the other. Safe while the stream is captured into a graph. Throws
// std::runtime_error with the kernel, how it was launched and what CUDA said.
void run(const std::vector<Launch>& launches, int device, void* stream);

}  // namespace cuda
}  // namespace fastattn
