#include "pictures.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "instruction_sets.hpp"

namespace fastcam {
namespace {

// Each output is a weighted sum of `taps` inputs from `first` on. All have the same number, some with weight 0.
struct Filter {
    std::size_t taps;
    std::vector<std::uint32_t> first;
    std::vector<std::int32_t> coefficients;  // (outputs, taps)
};

// The inputs within the triangle around an output's centre.
struct Reach {
    double centre;
    std::size_t first;
    std::size_t count;
};

// A triangle of one output's width to either side, of one input's when enlarging.
class Triangle {
public:
    Triangle(std::size_t inputs, std::size_t outputs)
        : inputs_(inputs), scale_(static_cast<double>(inputs) / static_cast<double>(outputs)),
          support_(std::max(scale_, 1.0)) {}

    Reach reach(std::size_t output) const {
        const double centre = (static_cast<double>(output) + 0.5) * scale_;
        const auto first = static_cast<std::size_t>(std::max(centre - support_ + 0.5, 0.0));
        const std::size_t end = std::min(static_cast<std::size_t>(centre + support_ + 0.5), inputs_);
        return {centre, first, end - first};
    }

    double weight(const Reach& reach, std::size_t tap) const {
        const double distance = static_cast<double>(tap + reach.first) - reach.centre + 0.5;
        return std::max(0.0, 1.0 - std::abs(distance * (1.0 / support_)));
    }

private:
    std::size_t inputs_;
    double scale_;
    double support_;
};

Filter make_filter(std::size_t inputs, std::size_t outputs) {
    const Triangle triangle(inputs, outputs);
    std::size_t taps = 0;
    for (std::size_t output = 0; output < outputs; ++output) taps = std::max(taps, triangle.reach(output).count);
    Filter filter{taps, std::vector<std::uint32_t>(outputs), std::vector<std::int32_t>(outputs * taps)};
    std::vector<double> weights(taps);
    for (std::size_t output = 0; output < outputs; ++output) {
        const Reach reach = triangle.reach(output);
        double total = 0;
        for (std::size_t tap = 0; tap < reach.count; ++tap) {
            weights[tap] = triangle.weight(reach, tap);
            total += weights[tap];
        }
        // At the far edge the taps start earlier, so that none is outside.
        const std::size_t first = std::min(reach.first, inputs - taps);
        filter.first[output] = static_cast<std::uint32_t>(first);
        std::int32_t* const coefficients = filter.coefficients.data() + output * taps + (reach.first - first);
        for (std::size_t tap = 0; tap < reach.count; ++tap) {
            coefficients[tap] = static_cast<std::int32_t>(0.5 + weights[tap] / total * (1 << filter_bits));
        }
    }
    return filter;
}

// The rows of a picture at the target's width, each computed once, on first use. Only the last few are kept.
class Stretched {
public:
    Stretched(const SimdKernels& kernels, const PrepareJob& job, std::size_t kept)
        : kernels_(kernels), job_(job), filter_(make_filter(job.source.width, job.target.width)), kept_(kept),
          stride_(3 * job.target.width + 1), rows_(kept * stride_),
          last_row_(job.pixels + 3 * job.source.width * (job.source.height - 1), job.pixels + 3 * job.source.area()) {
        last_row_.push_back(0);  // the kernel reads one byte past the end
    }

    // Rows must be requested in order, at most `kept` back.
    const std::uint8_t* row(std::size_t index) {
        for (; made_ <= index; ++made_) {
            const std::uint8_t* const source =
                made_ + 1 < job_.source.height ? job_.pixels + 3 * job_.source.width * made_ : last_row_.data();
            kernels_.filter_columns(source, filter_.first.data(), filter_.coefficients.data(), filter_.taps,
                                    job_.target.width, place(made_));
        }
        return place(index);
    }

private:
    std::uint8_t* place(std::size_t index) { return rows_.data() + index % kept_ * stride_; }

    const SimdKernels& kernels_;
    const PrepareJob& job_;
    const Filter filter_;
    const std::size_t kept_;
    const std::size_t stride_;
    std::vector<std::uint8_t> rows_;
    std::vector<std::uint8_t> last_row_;
    std::size_t made_ = 0;
};

void write_row(const PrepareJob& job, std::size_t y, const std::uint8_t* pixels) {
    const std::size_t step = job.channels_last ? 3 : 1;
    const std::size_t plane = job.channels_last ? 1 : job.target.area();
    for (std::size_t channel = 0; channel < 3; ++channel) {
        const float* const level = job.levels + 256 * channel;
        const std::uint8_t* const component = pixels + (job.reversed_order ? 2 - channel : channel);
        float* const target = job.input + channel * plane + y * job.target.width * step;
        for (std::size_t x = 0; x < job.target.width; ++x) target[x * step] = level[component[3 * x]];
    }
}

}  // namespace

void prepare(const PrepareJob& job) {
    const SimdKernels& kernels = chosen_kernels();
    const Filter filter = make_filter(job.source.height, job.target.height);
    Stretched stretched(kernels, job, filter.taps);
    std::vector<const std::uint8_t*> rows(filter.taps);
    std::vector<std::uint8_t> pixels(3 * job.target.width);
    for (std::size_t y = 0; y < job.target.height; ++y) {
        for (std::size_t tap = 0; tap < filter.taps; ++tap) rows[tap] = stretched.row(filter.first[y] + tap);
        kernels.filter_rows(rows.data(), filter.coefficients.data() + y * filter.taps, filter.taps, pixels.size(),
                            pixels.data());
        write_row(job, y, pixels.data());
    }
}

}  // namespace fastcam
