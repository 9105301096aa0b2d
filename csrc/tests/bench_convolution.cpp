// Times one convolution layer per line of standard input, and answers with one line each, for bench/convolution.py.
//
// A line: batch height width input_channels output_channels kernel stride channels_first residual pool threads
//         instruction_set algorithm runs      (algorithm: auto, winograd_4x4, winograd_6x6, pointwise or gathered)
// The answer: the algorithm and the seconds of each run.
#include <chrono>
#include <cmath>
#include <ctime>
#include <iomanip>
#include <iostream>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>

#include "convolution.hpp"
#include "huge_pages.hpp"
#include "instruction_sets.hpp"
#include "thread_pool.hpp"

namespace {

using namespace fastcam;

const std::map<std::string, Algorithm> algorithms = {
    {"winograd_4x4", Algorithm::winograd_4x4},
    {"winograd_6x6", Algorithm::winograd_6x6},
    {"pointwise", Algorithm::pointwise},
    {"gathered", Algorithm::gathered},
};

ParallelFor pool_of(std::size_t threads) {
    const auto run = [](void* pool, std::size_t tasks, ParallelFor::Task task, void* context) {
        ThreadPool::of_process().run(tasks, reinterpret_cast<std::uintptr_t>(pool),
                                     [=](std::size_t index) { task(context, index); });
    };
    return {run, reinterpret_cast<void*>(static_cast<std::uintptr_t>(threads)), threads};
}

// Memory as in a session after its first run.
class Floats {
public:
    explicit Floats(std::size_t count) : values_(static_cast<float*>(::operator new((count + 1) * sizeof(float), unit))) {
        prefer_huge_pages(values_.get(), count * sizeof(float));
        std::fill_n(values_.get(), count, 0.0f);
    }
    Floats(std::size_t count, float scale) : Floats(count) {
        static std::minstd_rand random(1);
        for (std::size_t i = 0; i < count; ++i) {
            values_.get()[i] = scale * (static_cast<float>(random()) / static_cast<float>(random.max()) - 0.5f);
        }
    }

    float* get() const { return values_.get(); }

private:
    static constexpr std::align_val_t unit{huge_page};
    struct Free {
        void operator()(float* values) const { ::operator delete(values, unit); }
    };
    std::unique_ptr<float, Free> values_;
};

// Seconds. Other programs affect processor time less, but it sums the time of all threads.
double now(std::size_t threads) {
    if (threads == 1) return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string measure(std::istream& line) {
    std::size_t batch, height, width, kernel, threads, runs;
    bool channels_first;
    std::string instruction_set, name;
    ConvolutionLayer layer;
    line >> batch >> height >> width >> layer.input_channels >> layer.output_channels >> kernel >> layer.stride >>
        channels_first >> layer.residual >> layer.pool >> threads >> instruction_set >> name >> runs;
    if (!line) throw std::invalid_argument("a line has 14 fields");
    use_instruction_set(instruction_set);
    layer.kernel_height = layer.kernel_width = kernel;
    layer.pad_top = layer.pad_left = layer.pad_bottom = layer.pad_right = kernel / 2;
    layer.input_layout = channels_first ? Layout::channels_first : Layout::channels_last;
    layer.low = 0;
    const auto chosen = choose_algorithm(layer, height, width);
    if (!chosen) throw std::invalid_argument("this layer is not supported");
    const Algorithm algorithm = name == "auto" ? *chosen : algorithms.at(name);

    const std::size_t depth = layer.input_channels * kernel * kernel;
    const Floats weights(layer.output_channels * depth, std::sqrt(2.0f / static_cast<float>(depth)));
    const Floats bias(layer.output_channels, 0.1f);
    const ParallelFor parallel = pool_of(threads);
    const Convolution convolution(layer, algorithm, weights.get(), bias.get(), parallel);
    const OutputSize size = convolution.output_size(height, width);
    const Floats input(batch * height * width * layer.input_channels, 1);
    const std::size_t outputs = batch * size.height * size.width * layer.output_channels;
    const Floats output(outputs);
    const Floats residual(layer.residual ? outputs : 0);
    const Floats scratch(convolution.scratch_bytes(batch, height, width, threads) / sizeof(float) + 1);

    std::ostringstream answer;
    answer << std::setprecision(9);
    for (const auto& [known, value] : algorithms) {
        if (value == algorithm) answer << known;
    }
    for (std::size_t run = 0; run < runs + 1; ++run) {
        const double start = now(threads);
        convolution.run(input.get(), layer.residual ? residual.get() : nullptr, output.get(), batch, height, width,
                        scratch.get(), parallel);
        const double end = now(threads);
        if (run > 0) answer << ' ' << end - start;
    }
    return answer.str();
}

}  // namespace

int main() {
    std::string text;
    while (std::getline(std::cin, text)) {
        std::istringstream line(text);
        std::cout << measure(line) << std::endl;
    }
}
