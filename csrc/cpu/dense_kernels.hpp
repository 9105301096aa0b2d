// The inner loop of a dense layer, compiled once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastcam {

// Columns of a strip of weights.
constexpr std::size_t strip_columns = 256;

struct DenseKernels {
    // sums[c] += sum over i < count of values[i] * strip[rows[i]][c], c < strip_columns, in the order of i.
    void (*accumulate)(const float* strip, const std::uint32_t* rows, const float* values, std::size_t count,
                       float* sums);
};

}  // namespace fastcam
