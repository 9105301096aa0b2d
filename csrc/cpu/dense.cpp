#include "dense.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "dense_kernels.hpp"
#include "huge_pages.hpp"
#include "instruction_sets.hpp"

namespace fastcam {
namespace {

// Number of inputs whose products are summed before they are added to the result: shorter sums are more exact, and the
// weights of a block stay in the cache from image to image.
constexpr std::size_t block_inputs = 512;

std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

// Zeros aligned to cache lines, in large pages.
class ZeroedFloats {
public:
    explicit ZeroedFloats(std::size_t count) : memory_(std::calloc(count * sizeof(float) + line, 1), &std::free) {
        if (!memory_) throw std::bad_alloc();
        prefer_huge_pages(memory_.get(), count * sizeof(float) + line);
        const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
        first_ = reinterpret_cast<float*>(ceil_div(address, line) * line);
    }

    float* get() const { return first_; }

private:
    static constexpr std::size_t line = 64;

    std::unique_ptr<void, decltype(&std::free)> memory_;
    float* first_;
};

// The non-zero inputs of an image, block by block.
struct Listed {
    std::uint32_t* rows;   // within the whole layer
    float* values;
    std::uint32_t* begins;  // of each block, and the end of the last
};

}  // namespace

struct Dense::State {
    std::size_t inputs;
    std::size_t outputs;
    float low;
    float high;
    std::size_t strips;
    std::size_t blocks;
    ZeroedFloats weights;  // (strips, inputs, strip_columns)
    ZeroedFloats bias;     // (strips, strip_columns)

    State(std::size_t inputs_, std::size_t outputs_, float low_, float high_)
        : inputs(inputs_),
          outputs(outputs_),
          low(low_),
          high(high_),
          strips(ceil_div(outputs_, strip_columns)),
          blocks(ceil_div(inputs_, block_inputs)),
          weights(strips * inputs_ * strip_columns),
          bias(strips * strip_columns) {}

    std::size_t list_bytes() const {
        return inputs * (sizeof(std::uint32_t) + sizeof(float)) + (blocks + 1) * sizeof(std::uint32_t);
    }

    Listed list(void* scratch, std::size_t image) const {
        auto* const bytes = static_cast<char*>(scratch) + image * list_bytes();
        auto* const rows = reinterpret_cast<std::uint32_t*>(bytes);
        auto* const values = reinterpret_cast<float*>(rows + inputs);
        return {rows, values, reinterpret_cast<std::uint32_t*>(values + inputs)};
    }

    void fill(const float* input, const Listed& listed) const {
        std::uint32_t count = 0;
        for (std::size_t block = 0; block < blocks; ++block) {
            listed.begins[block] = count;
            const std::size_t end = std::min(inputs, (block + 1) * block_inputs);
            for (std::size_t row = block * block_inputs; row < end; ++row) {
                // Always written, kept only if non-zero: no branch to predict.
                listed.rows[count] = static_cast<std::uint32_t>(row);
                listed.values[count] = input[row];
                count += input[row] != 0;  // NaN too
            }
        }
        listed.begins[blocks] = count;
    }

    void compute(std::size_t strip, float* output, std::size_t batch, void* scratch) const {
        const DenseKernels& kernels = *chosen_kernels().dense;
        const float* const strip_weights = weights.get() + strip * inputs * strip_columns;
        const std::size_t first = strip * strip_columns;
        const std::size_t columns = std::min(strip_columns, outputs - first);
        float sums[strip_columns];
        for (std::size_t image = 0; image < batch; ++image) {
            std::memcpy(output + image * outputs + first, bias.get() + first, columns * sizeof(float));
        }
        for (std::size_t block = 0; block < blocks; ++block) {
            for (std::size_t image = 0; image < batch; ++image) {
                const Listed listed = list(scratch, image);
                const std::size_t begin = listed.begins[block], count = listed.begins[block + 1] - begin;
                if (count == 0) continue;
                float* const target = output + image * outputs + first;
                std::memcpy(sums, target, columns * sizeof(float));
                kernels.accumulate(strip_weights, listed.rows + begin, listed.values + begin, count, sums);
                std::memcpy(target, sums, columns * sizeof(float));
            }
        }
        for (std::size_t image = 0; image < batch; ++image) {
            float* const target = output + image * outputs + first;
            // NaN passes through: it compares as neither.
            for (std::size_t column = 0; column < columns; ++column) {
                const float value = target[column] < low ? low : target[column];
                target[column] = value > high ? high : value;
            }
        }
    }
};

Dense::Dense(std::size_t inputs, std::size_t outputs, float low, float high)
    : state_(std::make_unique<State>(inputs, outputs, low, high)) {}
Dense::~Dense() = default;
Dense::Dense(Dense&&) noexcept = default;
Dense& Dense::operator=(Dense&&) noexcept = default;

std::size_t Dense::inputs() const { return state_->inputs; }
std::size_t Dense::outputs() const { return state_->outputs; }

bool Dense::set_rows(std::size_t first, std::size_t count, const float* rows) {
    State& state = *state_;
    for (std::size_t row = 0; row < count; ++row) {
        for (std::size_t strip = 0; strip < state.strips; ++strip) {
            const std::size_t column = strip * strip_columns;
            std::memcpy(state.weights.get() + (strip * state.inputs + first + row) * strip_columns,
                        rows + row * state.outputs + column,
                        std::min(strip_columns, state.outputs - column) * sizeof(float));
        }
    }
    return chosen_kernels().within(rows, count * state.outputs, std::numeric_limits<float>::max());
}

void Dense::set_bias(const float* bias) { std::copy_n(bias, state_->outputs, state_->bias.get()); }

std::size_t Dense::scratch_bytes(std::size_t batch) const { return batch * state_->list_bytes(); }

void Dense::run(const float* input, float* output, std::size_t batch, void* scratch, const ParallelFor& parallel) const {
    struct Call {
        const State& state;
        const float* input;
        float* output;
        std::size_t batch;
        void* scratch;
    } call{*state_, input, output, batch, scratch};
    parallel.run(
        parallel.pool, batch,
        [](void* context, std::size_t image) {
            const Call& self = *static_cast<const Call*>(context);
            self.state.fill(self.input + image * self.state.inputs, self.state.list(self.scratch, image));
        },
        &call);
    parallel.run(
        parallel.pool, state_->strips,
        [](void* context, std::size_t strip) {
            const Call& self = *static_cast<const Call*>(context);
            self.state.compute(strip, self.output, self.batch, self.scratch);
        },
        &call);
}

}  // namespace fastcam
