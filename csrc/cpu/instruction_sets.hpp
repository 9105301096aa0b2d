// Which of the compiled kernels run on this processor, and which of these are in use.
#pragma once

#include <string_view>
#include <vector>

#include "simd_kernels.hpp"

namespace fastcam {

const SimdKernels& chosen_kernels();

// The instruction sets that this processor has, best first.
std::vector<std::string_view> instruction_sets();
std::string_view instruction_set();
// For tests. Throws std::invalid_argument for one that this processor lacks.
void use_instruction_set(std::string_view name);

}  // namespace fastcam
