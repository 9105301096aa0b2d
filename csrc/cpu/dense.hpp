// A dense layer that reads only the weights of non-zero inputs.
//
// After a ReLU most inputs are zeros (of VGG16's first dense layer, which has 411 MB of weights, 80 to 90 % on photos),
// and a product with zero changes no sum: at small batch sizes, where reading the weights dominates, that share is
// saved.
//
// A result depends only on its own image, bit for bit, as in convolution.hpp.
#pragma once

#include <cstddef>
#include <memory>

#include "convolution.hpp"

namespace fastcam {

// output = clip(input * weights + bias, low, high)
class Dense {
public:
    // Weights and bias are zeros at first. Throws std::bad_alloc.
    Dense(std::size_t inputs, std::size_t outputs, float low, float high);
    ~Dense();
    Dense(Dense&&) noexcept;
    Dense& operator=(Dense&&) noexcept;

    // rows: (count, outputs), the weights of inputs `first` and following ones. False if one of them is not finite:
    // its product with zero is not zero, and such a layer must not be run.
    bool set_rows(std::size_t first, std::size_t count, const float* rows);
    void set_bias(const float* bias);

    std::size_t inputs() const;
    std::size_t outputs() const;

    std::size_t scratch_bytes(std::size_t batch) const;

    // input: (batch, inputs); output: (batch, outputs). Never throws.
    void run(const float* input, float* output, std::size_t batch, void* scratch, const ParallelFor& parallel) const;

private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace fastcam
