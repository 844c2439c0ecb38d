// The CPU core: cuts a call into jobs and runs them on the kernels of the best instruction set.
#pragma once

#include <string>
#include <vector>

#include "kernels/table.h"

namespace fastattn {

// Names of the instruction sets that this processor has and the module holds, the best first.
std::vector<std::string> instruction_sets();

// The kernels in use. FASTATTN_CPU_ISA names an instruction set; throws std::invalid_argument if there is no such one
// here.
const Kernels& kernels();

// Both write all of their outputs (see params.h). They throw std::bad_alloc without having written anything.
void forward(const Params& p, int threads);
void forward_with_cache(const Params& p, int threads);  // writes the new keys and values into the cache first
void backward(const Params& p, int threads);

// Multiply-adds as fast as the processor does them, on each of so many threads; returns the operations done.
int64_t multiply_adds(DType dtype, int64_t steps, int threads);

}  // namespace fastattn
