// From pictures to a network's input on the CPU. No Python.
#pragma once

#include <cstddef>
#include <cstdint>

#include "size.hpp"

namespace fastcam {

struct PrepareJob {
    const std::uint8_t* pixels;  // (source, 3)
    Size source;
    Size target;
    const float* levels;  // (3, 256): what each component becomes, in the order of the input's channels
    bool reversed_order;  // whether the input has the picture's channels in reverse order
    bool channels_last;
    float* input;  // (target, 3) if the channels are last, else (3, target)
};

// Rounding must not make the weights of a pixel overflow 32 bits.
constexpr std::size_t most_shrinking = std::size_t{1} << 21;

// Resizes with an antialiased triangle filter, in 8 bits per pass, with exactly the rounding of Pillow's BILINEAR, and
// looks the levels up. Neither side shrinks more than `most_shrinking` times.
void prepare(const PrepareJob& job);

}  // namespace fastcam
