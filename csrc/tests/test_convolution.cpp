// The convolutions against naive loops in double, for every instruction set of this processor. Every buffer is a heap
// block of its exact size, so that AddressSanitizer sees each byte read or written outside.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "convolution.hpp"
#include "instruction_sets.hpp"
#include "thread_pool.hpp"

namespace {

using namespace fastcam;

int passed = 0;
int failed = 0;

void check(bool condition, const std::string& what) {
    if (condition) {
        ++passed;
        return;
    }
    ++failed;
    std::printf("FAILED: %s\n", what.c_str());
}

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

// Relative L2 error of a layer. ONNX Runtime's direct convolution reaches about 5e-7, Winograd's algorithm over
// He-initialised weights at most about 1e-5, F(6x6, 3x3) on inputs without structure being the worst case.
constexpr double tolerance = 2e-5;

const std::vector<Algorithm> all_algorithms = {Algorithm::winograd_4x4, Algorithm::winograd_6x6, Algorithm::pointwise,
                                               Algorithm::gathered};

const char* name_of(Algorithm algorithm) {
    switch (algorithm) {
        case Algorithm::winograd_4x4: return "winograd_4x4";
        case Algorithm::winograd_6x6: return "winograd_6x6";
        case Algorithm::pointwise: return "pointwise";
        case Algorithm::gathered: return "gathered";
    }
    return "?";
}

using Task = ParallelFor::Task;

ParallelFor pool_of(std::size_t threads) {
    const auto run = [](void* pool, std::size_t tasks, Task task, void* context) {
        ThreadPool::of_process().run(tasks, reinterpret_cast<std::uintptr_t>(pool),
                                     [=](std::size_t index) { task(context, index); });
    };
    return {run, reinterpret_cast<void*>(static_cast<std::uintptr_t>(threads)), threads};
}

// Claims to have eight threads but has one, which starts with the last task.
ParallelFor backwards() {
    const auto run = [](void*, std::size_t tasks, Task task, void* context) {
        while (tasks > 0) task(context, --tasks);
    };
    return {run, nullptr, 8};
}

class Floats {
public:
    explicit Floats(std::size_t count) : count_(count), values_(new float[std::max<std::size_t>(count, 1)]) {}
    Floats(std::size_t count, float scale, std::mt19937& random) : Floats(count) {
        std::normal_distribution<float> normal(0, scale);
        for (std::size_t i = 0; i < count; ++i) values_[i] = normal(random);
    }

    float* get() const { return values_.get(); }
    std::size_t count() const { return count_; }
    float& operator[](std::size_t i) const { return values_[i]; }

private:
    std::size_t count_;
    std::unique_ptr<float[]> values_;
};

bool same_bits(const float* a, const float* b, std::size_t count) { return std::memcmp(a, b, count * sizeof *a) == 0; }

struct Case {
    ConvolutionLayer layer;
    std::size_t batch;
    std::size_t height;
    std::size_t width;
    Floats weights;
    Floats bias;
    Floats input;
    Floats residual;

    // He's initialisation (He et al. 2015): the results are about as large as the inputs.
    Case(const ConvolutionLayer& layer_, std::size_t batch_, std::size_t height_, std::size_t width_,
         std::mt19937& random, float scale = 1)
        : layer(layer_),
          batch(batch_),
          height(height_),
          width(width_),
          weights(layer.output_channels * depth(), std::sqrt(2.0f / static_cast<float>(depth())), random),
          bias(layer.output_channels, 0.5f * scale, random),
          input(batch * input_per_image(), scale, random),
          residual(layer.residual ? batch * full_size() * layer.output_channels : 0, scale, random) {}

    std::size_t depth() const { return layer.input_channels * layer.kernel_height * layer.kernel_width; }
    std::size_t input_per_image() const { return height * width * layer.input_channels; }
    // Before pooling.
    std::size_t rows() const {
        const std::size_t padded = height + layer.pad_top + layer.pad_bottom;
        return padded < layer.kernel_height ? 0 : (padded - layer.kernel_height) / layer.stride + 1;
    }
    std::size_t columns() const {
        const std::size_t padded = width + layer.pad_left + layer.pad_right;
        return padded < layer.kernel_width ? 0 : (padded - layer.kernel_width) / layer.stride + 1;
    }
    std::size_t full_size() const { return rows() * columns(); }
    std::size_t output_rows() const { return layer.pool ? rows() / 2 : rows(); }
    std::size_t output_columns() const { return layer.pool ? columns() / 2 : columns(); }
    std::size_t output_per_image() const { return output_rows() * output_columns() * layer.output_channels; }

    double pixel(std::size_t image, std::ptrdiff_t y, std::ptrdiff_t x, std::size_t channel) const {
        if (y < 0 || x < 0 || y >= static_cast<std::ptrdiff_t>(height) || x >= static_cast<std::ptrdiff_t>(width)) return 0;
        const auto row = static_cast<std::size_t>(y);
        const auto column = static_cast<std::size_t>(x);
        return layer.input_layout == Layout::channels_last
                   ? input[((image * height + row) * width + column) * layer.input_channels + channel]
                   : input[((image * layer.input_channels + channel) * height + row) * width + column];
    }

    std::string name(Algorithm algorithm) const {
        return std::string(instruction_set()) + ' ' + name_of(algorithm) + ' ' + std::to_string(batch) + 'x' +
               std::to_string(height) + 'x' + std::to_string(width) + 'x' + std::to_string(layer.input_channels) + " > " +
               std::to_string(layer.output_channels) + " kernel " + std::to_string(layer.kernel_height) + 'x' +
               std::to_string(layer.kernel_width) + " stride " + std::to_string(layer.stride) +
               (layer.residual ? " residual" : "") + (layer.pool ? " pool" : "") + " clip " + std::to_string(layer.low) +
               ".." + std::to_string(layer.high);
    }
};

struct Expected {
    std::vector<double> values;  // as the output
    double scale;                // L2 norm that the results have when their terms do not cancel
};

// One result before clip and pooling, and the sum of the squares of its terms.
struct Sum {
    double value;
    double squares;
};

Sum convolve(const Case& test, std::size_t image, std::size_t row, std::size_t column, std::size_t channel) {
    const ConvolutionLayer& layer = test.layer;
    Sum sum{test.bias[channel], 0};
    if (layer.residual) {
        const std::size_t pixel = (image * test.rows() + row) * test.columns() + column;
        sum.value += test.residual[pixel * layer.output_channels + channel];
    }
    for (std::size_t c = 0; c < layer.input_channels; ++c) {
        for (std::size_t i = 0; i < layer.kernel_height; ++i) {
            for (std::size_t j = 0; j < layer.kernel_width; ++j) {
                const auto y = static_cast<std::ptrdiff_t>(row * layer.stride + i) - static_cast<std::ptrdiff_t>(layer.pad_top);
                const auto x =
                    static_cast<std::ptrdiff_t>(column * layer.stride + j) - static_cast<std::ptrdiff_t>(layer.pad_left);
                const double weight =
                    test.weights[((channel * layer.input_channels + c) * layer.kernel_height + i) * layer.kernel_width + j];
                const double term = weight * test.pixel(image, y, x, c);
                sum.value += term;
                sum.squares += term * term;
            }
        }
    }
    return sum;
}

Expected expect(const Case& test) {
    const ConvolutionLayer& layer = test.layer;
    const std::size_t size = layer.pool ? 2 : 1;
    Expected expected{{}, 0};
    for (std::size_t image = 0; image < test.batch; ++image) {
        for (std::size_t row = 0; row < test.output_rows(); ++row) {
            for (std::size_t column = 0; column < test.output_columns(); ++column) {
                for (std::size_t channel = 0; channel < layer.output_channels; ++channel) {
                    double most = -std::numeric_limits<double>::infinity();
                    for (std::size_t k = 0; k < size * size; ++k) {
                        const Sum sum = convolve(test, image, row * size + k / size, column * size + k % size, channel);
                        const double clipped = std::min<double>(std::max<double>(sum.value, layer.low), layer.high);
                        most = std::max(most, clipped);
                        expected.scale += sum.squares / static_cast<double>(size * size);
                    }
                    expected.values.push_back(most);
                }
            }
        }
    }
    expected.scale = std::sqrt(expected.scale);
    return expected;
}

Convolution prepared(const Case& test, Algorithm algorithm, const ParallelFor& parallel) {
    // The weights are freed before the layer runs.
    const Floats weights(test.weights.count());
    std::copy_n(test.weights.get(), test.weights.count(), weights.get());
    return Convolution(test.layer, algorithm, weights.get(), test.bias.get(), parallel);
}

// Images `first` to `first + batch` of the case. Scratch memory starts at an odd address and holds NaN.
Floats run(const Convolution& convolution, const Case& test, std::size_t first, std::size_t batch,
           const ParallelFor& parallel) {
    Floats output(batch * test.output_per_image());
    std::fill_n(output.get(), output.count(), not_a_number);
    const std::size_t bytes = convolution.scratch_bytes(batch, test.height, test.width, parallel.threads);
    const std::unique_ptr<std::byte[]> scratch(new std::byte[bytes + 1]);
    std::memset(scratch.get(), 0xff, bytes + 1);
    const std::size_t residual = first * test.full_size() * test.layer.output_channels;
    convolution.run(test.input.get() + first * test.input_per_image(),
                    test.layer.residual ? test.residual.get() + residual : nullptr, output.get(), batch, test.height,
                    test.width, scratch.get() + 1, parallel);
    return output;
}

Floats run(const Convolution& convolution, const Case& test, const ParallelFor& parallel) {
    return run(convolution, test, 0, test.batch, parallel);
}

double error_of(const Floats& output, const Expected& expected) {
    double squares = 0;
    double norm = 0;
    for (std::size_t i = 0; i < output.count(); ++i) {
        const double difference = output[i] - expected.values[i];
        squares += difference * difference;
        norm += expected.values[i] * expected.values[i];
    }
    const double scale = std::max(std::sqrt(norm), expected.scale);
    return squares == 0 ? 0 : std::sqrt(squares) / scale;
}

double worst_error = 0;

void check_values(const Case& test, Algorithm algorithm, const ParallelFor& parallel) {
    const Convolution convolution = prepared(test, algorithm, parallel);
    const OutputSize size = convolution.output_size(test.height, test.width);
    check(size.height == test.output_rows() && size.width == test.output_columns(), "size of " + test.name(algorithm));
    const double error = error_of(run(convolution, test, parallel), expect(test));
    worst_error = std::max(worst_error, error);
    check(error <= tolerance, test.name(algorithm) + ": relative error " + std::to_string(error * 1e6) + "e-6");
}

// ---- cases

std::size_t any(std::size_t least, std::size_t most, std::mt19937& random) {
    return std::uniform_int_distribution<std::size_t>(least, most)(random);
}

void set_fusions(ConvolutionLayer& layer, bool may_pool, std::mt19937& random) {
    switch (any(0, 3, random)) {
        case 0: break;
        case 1: layer.low = 0; break;
        case 2: layer.low = 0; layer.high = 6; break;
        default: layer.low = -0.75f; layer.high = 0.5f;
    }
    const std::size_t fusion = any(0, 2, random);
    layer.residual = fusion == 1;
    layer.pool = fusion == 2 && may_pool;
}

ConvolutionLayer any_layer(Algorithm algorithm, std::mt19937& random) {
    ConvolutionLayer layer;
    layer.input_channels = any(1, 70, random);
    layer.output_channels = any(1, 70, random);
    const bool winograd = algorithm == Algorithm::winograd_4x4 || algorithm == Algorithm::winograd_6x6;
    set_fusions(layer, winograd, random);
    if (algorithm == Algorithm::pointwise) {
        layer.kernel_height = layer.kernel_width = 1;
        layer.pad_top = layer.pad_left = layer.pad_bottom = layer.pad_right = 0;
        layer.stride = any(1, 2, random);
    }
    if (algorithm == Algorithm::gathered) {
        layer.kernel_height = any(1, 7, random);
        layer.kernel_width = any(1, 7, random);
        layer.stride = any(1, 3, random);
        layer.pad_top = any(0, layer.kernel_height, random);
        layer.pad_left = any(0, layer.kernel_width, random);
        layer.pad_bottom = any(0, layer.kernel_height, random);
        layer.pad_right = any(0, layer.kernel_width, random);
        if (any(0, 1, random) == 0) {
            layer.input_channels = any(1, 4, random);
            layer.input_layout = Layout::channels_first;
        }
    }
    return layer;
}

ConvolutionLayer winograd_layer(std::size_t input_channels, std::size_t output_channels) {
    ConvolutionLayer layer;
    layer.input_channels = input_channels;
    layer.output_channels = output_channels;
    return layer;
}

ConvolutionLayer pointwise_layer(std::size_t input_channels, std::size_t output_channels) {
    ConvolutionLayer layer = winograd_layer(input_channels, output_channels);
    layer.kernel_height = layer.kernel_width = 1;
    layer.pad_top = layer.pad_left = layer.pad_bottom = layer.pad_right = 0;
    return layer;
}

ConvolutionLayer layer_for(Algorithm algorithm, std::size_t input_channels, std::size_t output_channels) {
    return algorithm == Algorithm::pointwise ? pointwise_layer(input_channels, output_channels)
                                             : winograd_layer(input_channels, output_channels);
}

void test_small_layers() {
    std::mt19937 random(1);
    for (const Algorithm algorithm : all_algorithms) {
        for (int i = 0; i < 60; ++i) {
            const Case test(any_layer(algorithm, random), any(1, 9, random), any(1, 17, random), any(1, 17, random), random);
            check_values(test, algorithm, pool_of(any(1, 8, random)));
        }
    }
}

void test_large_maps() {
    std::mt19937 random(2);
    const std::size_t extents[][2] = {{300, 1}, {1, 300}, {299, 300}, {57, 56}, {113, 31}};
    for (const Algorithm algorithm : all_algorithms) {
        for (const auto& extent : extents) {
            ConvolutionLayer layer = layer_for(algorithm, any(1, 6, random), any(1, 18, random));
            set_fusions(layer, algorithm == Algorithm::winograd_4x4 || algorithm == Algorithm::winograd_6x6, random);
            check_values(Case(layer, 1, extent[0], extent[1], random), algorithm, pool_of(3));
        }
    }
}

void test_many_channels() {
    std::mt19937 random(3);
    const std::size_t channels[][2] = {{512, 33}, {130, 258}, {1024, 40}, {20, 600}};
    for (const Algorithm algorithm : all_algorithms) {
        for (const auto& [inputs, outputs] : channels) {
            check_values(Case(layer_for(algorithm, inputs, outputs), 2, 7, 5, random), algorithm, pool_of(2));
        }
    }
}

// Tiles that fill the whole plans, by tiles and by positions, with more than one pass.
std::vector<Case> large_cases(Algorithm algorithm, std::mt19937& random) {
    std::vector<Case> cases;
    ConvolutionLayer few = layer_for(algorithm, 24, 40);
    few.residual = true;
    few.low = 0;
    cases.emplace_back(few, 4, 50, 50, random);
    ConvolutionLayer many = layer_for(algorithm, 136, 40);
    many.pool = algorithm == Algorithm::winograd_4x4 || algorithm == Algorithm::winograd_6x6;
    cases.emplace_back(many, 3, 56, 56, random);
    cases.emplace_back(layer_for(algorithm, 33, 17), 5, 13, 9, random);
    return cases;
}

void test_same_bits() {
    std::mt19937 random(4);
    for (const Algorithm algorithm : all_algorithms) {
        for (const Case& test : large_cases(algorithm, random)) {
            const Convolution convolution = prepared(test, algorithm, pool_of(2));
            const Floats whole = run(convolution, test, pool_of(1));
            for (const std::size_t threads : {2, 3, 8}) {
                const Floats again = run(convolution, test, pool_of(threads));
                check(same_bits(whole.get(), again.get(), whole.count()), "threads change bits: " + test.name(algorithm));
            }
            const Convolution other = prepared(test, algorithm, backwards());
            const Floats reversed = run(other, test, backwards());
            check(same_bits(whole.get(), reversed.get(), whole.count()), "order changes bits: " + test.name(algorithm));
            for (std::size_t first = 0; first < test.batch; ++first) {
                const Floats alone = run(convolution, test, first, 1, pool_of(2));
                check(same_bits(whole.get() + first * test.output_per_image(), alone.get(), alone.count()),
                      "batch changes bits: " + test.name(algorithm));
            }
        }
    }
}

void test_calls_at_once() {
    std::mt19937 random(5);
    for (const Algorithm algorithm : all_algorithms) {
        const Case test(layer_for(algorithm, 24, 40), 2, 30, 30, random);
        const Convolution convolution = prepared(test, algorithm, pool_of(2));
        const Floats expected = run(convolution, test, pool_of(1));
        std::vector<std::thread> callers;
        std::vector<int> same(8, 0);
        for (std::size_t caller = 0; caller < same.size(); ++caller) {
            callers.emplace_back([&, caller] {
                bool all = true;
                for (int i = 0; i < 4; ++i) {
                    const Floats output = run(convolution, test, pool_of(1 + caller % 3));
                    all &= same_bits(output.get(), expected.get(), output.count());
                }
                same[caller] = all;
            });
        }
        for (std::thread& caller : callers) caller.join();
        check(std::count(same.begin(), same.end(), 1) == 8, "calls at once: " + test.name(algorithm));
    }
}

// Inputs so large that the transforms overflow (at 3e37; results stay below the largest float by six deviations):
// finite and as exact as others where direct convolution is. Bias and results that were not scaled back would be far
// off.
void test_large_inputs() {
    std::mt19937 random(6);
    for (const Algorithm algorithm : all_algorithms) {
        for (const float scale : {1e30f, 3e37f}) {
            ConvolutionLayer layer = layer_for(algorithm, 20, 35);
            layer.residual = true;
            check_values(Case(layer, 2, 20, 20, random, scale), algorithm, pool_of(2));
            ConvolutionLayer relu = layer_for(algorithm, 150, 35);
            relu.low = 0;
            relu.pool = algorithm == Algorithm::winograd_4x4 || algorithm == Algorithm::winograd_6x6;
            check_values(Case(relu, 2, 14, 14, random, scale), algorithm, pool_of(2));
        }
        // Only one image of the batch is large: the others are unaffected.
        const Case plain(layer_for(algorithm, 20, 35), 3, 30, 30, random);
        const Convolution convolution = prepared(plain, algorithm, pool_of(2));
        const Floats before = run(convolution, plain, pool_of(2));
        for (std::size_t i = 0; i < plain.input_per_image(); ++i) plain.input[plain.input_per_image() + i] *= 1e37f;
        const Floats after = run(convolution, plain, pool_of(2));
        const std::size_t count = plain.output_per_image();
        check(same_bits(before.get(), after.get(), count), "a large neighbour: " + plain.name(algorithm));
        check(same_bits(before.get() + 2 * count, after.get() + 2 * count, count), "a large neighbour: " + plain.name(algorithm));
    }
}

// NaN and infinity reach every result that depends on them, even through a ReLU, and no other image.
void test_not_finite() {
    std::mt19937 random(7);
    for (const Algorithm algorithm : all_algorithms) {
        for (const float value : {not_a_number, infinity, -infinity}) {
            ConvolutionLayer layer = layer_for(algorithm, 18, 20);
            if (std::isnan(value)) layer.low = 0;
            const Case test(layer, 3, 25, 26, random);
            const Convolution convolution = prepared(test, algorithm, pool_of(2));
            const Floats before = run(convolution, test, pool_of(2));
            const std::size_t row = 11;
            const std::size_t column = 12;
            test.input[((test.height + row) * test.width + column) * layer.input_channels + 5] = value;
            const Floats after = run(convolution, test, pool_of(2));
            bool reached = true;
            const std::size_t radius = layer.kernel_height / 2;
            for (std::size_t y = row - radius; y <= row + radius; ++y) {
                for (std::size_t x = column - radius; x <= column + radius; ++x) {
                    for (std::size_t c = 0; c < layer.output_channels; ++c) {
                        reached &= !std::isfinite(after[((test.rows() + y) * test.columns() + x) * layer.output_channels + c]);
                    }
                }
            }
            check(reached, std::to_string(value) + " is lost: " + test.name(algorithm));
            const std::size_t count = test.output_per_image();
            check(same_bits(before.get(), after.get(), count) &&
                      same_bits(before.get() + 2 * count, after.get() + 2 * count, count),
                  std::to_string(value) + " reaches a neighbour: " + test.name(algorithm));
        }
    }
}

void test_no_bias() {
    std::mt19937 random(8);
    for (const Algorithm algorithm : all_algorithms) {
        const Case test(layer_for(algorithm, 9, 35), 1, 9, 9, random);
        std::fill_n(test.bias.get(), test.bias.count(), 0.0f);
        const Convolution convolution(test.layer, algorithm, test.weights.get(), nullptr, pool_of(1));
        check(error_of(run(convolution, test, pool_of(1)), expect(test)) <= tolerance, "no bias: " + test.name(algorithm));
    }
}

void test_empty() {
    std::mt19937 random(9);
    for (const Algorithm algorithm : all_algorithms) {
        ConvolutionLayer layer = layer_for(algorithm, 4, 4);
        for (const Case& test : {Case(layer, 0, 5, 5, random), Case(layer, 2, 0, 5, random), Case(layer, 2, 5, 0, random)}) {
            const Convolution convolution = prepared(test, algorithm, pool_of(2));
            check(run(convolution, test, pool_of(2)).count() == 0 || test.height * test.width == 0,
                  "empty: " + test.name(algorithm));
        }
    }
    ConvolutionLayer pool = winograd_layer(4, 4);
    pool.pool = true;
    const Case test(pool, 2, 1, 5, random);
    const Convolution convolution = prepared(test, Algorithm::winograd_4x4, pool_of(2));
    check(run(convolution, test, pool_of(2)).count() == 0, "nothing to pool");
}

template <class Body>
bool throws_invalid_argument(const Body& body) {
    try {
        body();
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

void test_choice() {
    const bool supported = convolution_supported();
    const auto chosen = [&](const ConvolutionLayer& layer, std::size_t height, std::optional<Algorithm> algorithm) {
        return choose_algorithm(layer, height, height) == (supported ? algorithm : std::nullopt);
    };
    check(chosen(winograd_layer(64, 64), 224, Algorithm::winograd_6x6), "large maps");
    check(chosen(winograd_layer(64, 64), 56, Algorithm::winograd_6x6), "maps of 56 rows");
    check(chosen(winograd_layer(64, 64), 55, Algorithm::winograd_4x4), "smaller maps");
    check(chosen(winograd_layer(64, 64), 0, Algorithm::winograd_4x4), "maps of unknown size");
    check(chosen(winograd_layer(3, 64), 224, Algorithm::gathered), "few channels");
    check(chosen(pointwise_layer(64, 64), 56, Algorithm::pointwise), "1x1");
    ConvolutionLayer strided = winograd_layer(64, 64);
    strided.stride = 2;
    check(chosen(strided, 56, Algorithm::gathered), "stride 2");
    ConvolutionLayer first = winograd_layer(4, 64);
    first.input_layout = Layout::channels_first;
    check(chosen(first, 224, Algorithm::gathered), "channels first");

    std::vector<ConvolutionLayer> refused(9, winograd_layer(64, 64));
    refused[0].input_channels = 0;
    refused[1].output_channels = 0;
    refused[2].kernel_width = 0;
    refused[3].stride = 0;
    refused[4].low = not_a_number;
    refused[5].pool = refused[5].residual = true;
    refused[6].pool = true;
    refused[6].stride = 2;
    refused[7].input_layout = Layout::channels_first;
    refused[8] = pointwise_layer(64, 64);
    refused[8].pool = true;
    for (const ConvolutionLayer& layer : refused) {
        check(!choose_algorithm(layer, 56, 56), "a layer that is not supported");
        for (const Algorithm algorithm : all_algorithms) {
            if (layer.pool && !layer.residual && layer.stride == 1) continue;
            check(throws_invalid_argument([&] { Convolution(layer, algorithm, nullptr, nullptr, pool_of(1)); }),
                  "an algorithm that does not fit");
        }
    }
}

void test_sizes() {
    const std::size_t weights = 512 * 512 * 9 * sizeof(float);
    const ConvolutionLayer layer = winograd_layer(512, 512);
    check(Convolution::prepared_bytes(layer, Algorithm::winograd_4x4) == 4 * weights, "4 times the weights");
    check(Convolution::prepared_bytes(layer, Algorithm::winograd_6x6) == weights / 9 * 64, "7.1 times the weights");
    check(Convolution::prepared_bytes(layer, Algorithm::gathered) == weights, "the weights");
}

void run_all() {
    test_choice();
    test_sizes();
    test_empty();
    test_no_bias();
    test_small_layers();
    test_large_maps();
    test_many_channels();
    test_same_bits();
    test_calls_at_once();
    test_large_inputs();
    test_not_finite();
}

}  // namespace

int main() {
    for (const std::string_view name : instruction_sets()) {
        use_instruction_set(name);
        worst_error = 0;
        run_all();
        std::printf("%s: largest relative error %.2e\n", std::string(name).c_str(), worst_error);
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
