// Convolution layers in float32 with channels-last results: Winograd for 3x3, matrix products for the rest, with bias,
// residual sum, activation and 2x2 max pooling fused.
//
// A result depends only on its own image, bit for bit: neither the batch size, nor the other images of the batch, nor
// the number of threads changes the order of any sum. Different instruction sets may round differently.
//
// Sources: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015 (arXiv:1509.09308); Barabasz et
// al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", 2018
// (arXiv:1803.10986).
#pragma once

#include <cstddef>
#include <limits>
#include <memory>
#include <optional>

namespace fastcam {

// Foreign threads, such as the session's pool.
struct ParallelFor {
    // Calls task(context, 0) ... task(context, tasks - 1), each once, in any order, on any threads; returns when all
    // have finished. The tasks in this file never throw.
    using Task = void (*)(void* context, std::size_t index);
    void (*run)(void* pool, std::size_t tasks, Task task, void* context);
    void* pool;
    // Maximum number of concurrent tasks. A wrong number only costs time or memory.
    std::size_t threads;
};

enum class Layout { channels_first, channels_last };

// A convolution and what is fused into it: output = pool(clip(convolution(input) + bias + residual, low, high)).
// Groups and dilation are not supported: ONNX Runtime keeps those layers. The output is always channels-last.
struct ConvolutionLayer {
    std::size_t input_channels = 0;
    std::size_t output_channels = 0;
    std::size_t kernel_height = 3;
    std::size_t kernel_width = 3;
    std::size_t stride = 1;  // in both directions
    std::size_t pad_top = 1;
    std::size_t pad_left = 1;
    std::size_t pad_bottom = 1;
    std::size_t pad_right = 1;
    Layout input_layout = Layout::channels_last;
    bool residual = false;  // run() gets a tensor of the output's shape, added before the clip
    bool pool = false;      // 2x2 max pooling, stride 2, no padding; an odd last row or column is dropped; not with residual
    // ReLU: 0 and infinity; ReLU6: 0 and 6; no activation: the defaults. NaN passes through.
    float low = -std::numeric_limits<float>::infinity();
    float high = std::numeric_limits<float>::infinity();
};

enum class Algorithm {
    winograd_4x4,  // F(4x4, 3x3): 36 products per 16 results instead of 144
    winograd_6x6,  // F(6x6, 3x3): 64 products per 36 results instead of 324
    pointwise,     // 1x1: a matrix product directly on the input
    gathered,      // any kernel: the window of each result is copied to scratch memory, then as pointwise
};

// The fastest algorithm for a layer whose input has `height` rows and `width` columns (0: unknown), or nothing
// for a layer that is not supported: a size of zero; pooling of a layer that is unsuitable for Winograd's algorithm, or
// together with a residual; more than 4 input channels in channels-first layout; or any layer where
// convolution_supported() is false. The choice depends only on the shape of the layer, never on the batch.
std::optional<Algorithm> choose_algorithm(const ConvolutionLayer& layer, std::size_t height, std::size_t width);

// Whether the instruction set in use has convolution kernels: AVX-512, AVX2 or NEON.
bool convolution_supported();

// Shape of one image's output.
struct OutputSize {
    std::size_t height;
    std::size_t width;
};

// A layer with its weights, ready to run on inputs of any size. Immutable: one object serves many threads at once.
class Convolution {
public:
    // Bytes that an object holds for the weights. Winograd: 4 times (4x4) or 7.1 times (6x6) those of the weights.
    static std::size_t prepared_bytes(const ConvolutionLayer& layer, Algorithm algorithm);

    // weights: (output channels, input channels, kernel height, kernel width); bias: (output channels), or null for
    // none. Neither is needed after the constructor returns. Throws std::bad_alloc, and std::invalid_argument for an
    // algorithm that does not fit the layer.
    Convolution(const ConvolutionLayer& layer, Algorithm algorithm, const float* weights, const float* bias,
                const ParallelFor& parallel);
    ~Convolution();
    Convolution(Convolution&&) noexcept;
    Convolution& operator=(Convolution&&) noexcept;

    const ConvolutionLayer& layer() const;
    Algorithm algorithm() const;

    // Zero rows or columns if the input is smaller than the kernel or the pooling window.
    OutputSize output_size(std::size_t height, std::size_t width) const;

    // Bytes of scratch memory that run() needs, of any alignment. `threads`: ParallelFor::threads of that call.
    std::size_t scratch_bytes(std::size_t batch, std::size_t height, std::size_t width, std::size_t threads) const;

    // input: (batch, height, width, input channels), or (batch, input channels, height, width) for channels first.
    // residual: of the output's shape, or null if the layer has none.
    // output: (batch, output height, output width, output channels); it must not overlap the others.
    // Nothing is read or written outside these. Never throws, allocates no memory and holds no lock.
    void run(const float* input, const float* residual, float* output, std::size_t batch, std::size_t height,
             std::size_t width, void* scratch, const ParallelFor& parallel) const;

private:
    struct State;
    std::unique_ptr<const State> state_;
};

}  // namespace fastcam
