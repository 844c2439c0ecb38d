// The choice of an instruction set: one table of kernels for each that the module holds.
#pragma once

#include <string>
#include <vector>

#include "kernels/table.h"

namespace fastattn {

// Names of the instruction sets that this processor has and the module holds, the best first.
std::vector<std::string> instruction_sets();

// The kernels in use: of the best instruction set, or of the one that FASTATTN_CPU_ISA names. Throws
// std::invalid_argument if this processor has none of that name.
const Kernels& kernels();

}  // namespace fastattn
