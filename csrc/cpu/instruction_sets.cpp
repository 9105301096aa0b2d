#include "instruction_sets.hpp"

#include <atomic>
#include <stdexcept>
#include <string>

namespace fastcam {
namespace {

std::vector<const SimdKernels*> supported_kernels() {
    std::vector<const SimdKernels*> kernels;
#if defined(FASTCAM_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        kernels.push_back(&avx512_kernels);
    }
    if (avx2) kernels.push_back(&avx2_kernels);
#endif
    kernels.push_back(&baseline_kernels);
    return kernels;
}

std::atomic<const SimdKernels*>& choice() {
    static std::atomic<const SimdKernels*> kernels{supported_kernels().front()};
    return kernels;
}

}  // namespace

const SimdKernels& chosen_kernels() { return *choice(); }

std::vector<std::string_view> instruction_sets() {
    std::vector<std::string_view> names;
    for (const SimdKernels* kernels : supported_kernels()) names.emplace_back(kernels->name);
    return names;
}

std::string_view instruction_set() { return chosen_kernels().name; }

void use_instruction_set(std::string_view name) {
    for (const SimdKernels* kernels : supported_kernels()) {
        if (kernels->name == name) {
            choice() = kernels;
            return;
        }
    }
    throw std::invalid_argument("this processor has no instruction set '" + std::string(name) + "'");
}

}  // namespace fastcam
