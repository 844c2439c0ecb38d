// Runs calls on the CPU: plans them, and executes the plans with the kernels of the instruction set in use.
#pragma once

#include "../call/params.h"

namespace fastattn {

// All write all of their outputs (see params.h). They throw std::bad_alloc without having written anything.
void forward(const Params& p, int threads);
void forward_with_cache(const Params& p, int threads);  // writes the new keys and values into the cache first
void backward(const Params& p, int threads);

// Multiply-adds as fast as the processor does them, on each of so many threads; returns the operations done.
int64_t multiply_adds(DType dtype, int64_t steps, int threads);

}  // namespace fastattn
