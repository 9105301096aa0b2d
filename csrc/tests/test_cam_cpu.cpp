// The kernels against naive loops in double, for every instruction set of this processor. Every buffer is a heap block
// of its exact size, so that AddressSanitizer sees each byte read or written outside.
#include <algorithm>
#include <atomic>
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

#include "cam_cpu.hpp"
#include "instruction_sets.hpp"
#include "pictures.hpp"
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

// Only for values that a half represents exactly: small integers over powers of two.
std::uint16_t exact_half(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value == 0) return 0;
    const auto exponent = static_cast<int>((bits >> 23) & 0xff) - 127 + 15;
    return static_cast<std::uint16_t>(((bits >> 16) & 0x8000) | (static_cast<std::uint32_t>(exponent) << 10) |
                                      ((bits >> 13) & 0x3ff));
}

// Numbers as passed to the kernels, and as used by the naive loop.
class Numbers {
public:
    Numbers(std::size_t count, Scalar scalar, std::mt19937& random)
        : scalar_(scalar), values_(count), bytes_(new std::byte[std::max<std::size_t>(count, 1) * width()]) {
        std::uniform_int_distribution<int> integer(-32, 32);
        for (std::size_t i = 0; i < count; ++i) set(i, static_cast<float>(integer(random)) / 16);
    }

    void set(std::size_t i, float value) {
        values_[i] = value;
        if (scalar_ == Scalar::float32) {
            std::memcpy(bytes_.get() + 4 * i, &value, 4);
        } else {
            const std::uint16_t half = std::isnan(value) ? std::uint16_t{0x7e00} : exact_half(value);
            std::memcpy(bytes_.get() + 2 * i, &half, 2);
        }
    }

    double operator[](std::size_t i) const { return values_[i]; }
    Batch batch(std::size_t per_image) const {
        return {bytes_.get(), static_cast<std::ptrdiff_t>(per_image), scalar_};
    }

private:
    std::size_t width() const { return scalar_ == Scalar::float32 ? 4 : 2; }

    Scalar scalar_;
    std::vector<float> values_;
    std::unique_ptr<std::byte[]> bytes_;
};

struct Case {
    Count count;
    std::size_t channels;
    Size size;
    ChannelOrder channel_order;
    Weighting weighting;
    Normalization normalization;
    Scalar activations;
    Scalar weights;
    std::size_t threads;

    std::size_t at(std::size_t c, std::size_t p) const {
        return channel_order == ChannelOrder::channels_first ? c * size.area() + p : p * channels + c;
    }

    std::string name() const {
        char text[160];
        std::snprintf(text, sizeof text, "%s n=%zu k=%zu c=%zu %zux%zu layout=%d weighting=%d norm=%d types=%d%d threads=%zu",
                      std::string(instruction_set()).c_str(), count.images, count.maps, channels, size.height, size.width,
                      static_cast<int>(channel_order), static_cast<int>(weighting), static_cast<int>(normalization),
                      static_cast<int>(activations), static_cast<int>(weights), threads);
        return text;
    }
};

struct Naive {
    std::vector<double> maps;
    std::vector<double> evidence;
};

Naive naive_maps(const Case& c, const Numbers& activations, const Numbers& weights) {
    const std::size_t area = c.size.area();
    Naive found;
    for (std::size_t nk = 0; nk < c.count.images * c.count.maps; ++nk) {
        std::vector<double> map(area);
        for (std::size_t channel = 0; channel < c.channels; ++channel) {
            const auto weight = [&](std::size_t p) {
                return weights[nk * c.channels * area + c.at(channel, p)];
            };
            double shared = 0;
            if (c.weighting == Weighting::channel) shared = weights[nk * c.channels + channel];
            if (c.weighting == Weighting::pooled) {
                for (std::size_t p = 0; p < area; ++p) shared += weight(p);
                shared /= static_cast<double>(area);
            }
            for (std::size_t p = 0; p < area; ++p) {
                map[p] += (c.weighting == Weighting::element ? weight(p) : shared) *
                          activations[nk / c.count.maps * c.channels * area + c.at(channel, p)];
            }
        }
        double positive = 0;
        double all = 0;
        for (const double value : map) {
            positive += std::max(value, 0.0);
            all += std::abs(value);
        }
        found.evidence.push_back(all > 0 ? positive / all : 0);
        for (double& value : map) value = std::max(value, 0.0);
        if (c.normalization != Normalization::none) {
            const double low = c.normalization == Normalization::minmax ? *std::min_element(map.begin(), map.end()) : 0;
            const double span = *std::max_element(map.begin(), map.end()) - low;
            for (double& value : map) value = span > 0 ? (value - low) / span : 0;
        }
        found.maps.insert(found.maps.end(), map.begin(), map.end());
    }
    return found;
}

double naive_at(const double* map, Size size, double y, double x) {
    const auto pixel = [&](double row, double column) {
        const auto clamped = [](double v, std::size_t n) {
            return static_cast<std::size_t>(std::min(std::max(v, 0.0), static_cast<double>(n - 1)));
        };
        return map[clamped(row, size.height) * size.width + clamped(column, size.width)];
    };
    const double top = std::floor(y);
    const double left = std::floor(x);
    const double fy = y - top;
    const double fx = x - left;
    return (1 - fy) * ((1 - fx) * pixel(top, left) + fx * pixel(top, left + 1)) +
           fy * ((1 - fx) * pixel(top + 1, left) + fx * pixel(top + 1, left + 1));
}

double relative_error(const std::vector<double>& expected, const float* actual) {
    double difference = 0;
    double norm = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        difference += (expected[i] - actual[i]) * (expected[i] - actual[i]);
        norm += expected[i] * expected[i];
    }
    return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

template <class T>
std::unique_ptr<T[]> exact(std::size_t count) {
    return std::unique_ptr<T[]>(new T[count]);
}

void run_case(const Case& c, Size target, bool with_overlay, std::mt19937& random) {
    const std::size_t area = c.size.area();
    const std::size_t map_count = c.count.images * c.count.maps;
    const std::size_t weights_per_image = c.count.maps * c.channels * (c.weighting == Weighting::channel ? 1 : area);
    const Numbers activations(c.count.images * c.channels * area, c.activations, random);
    const Numbers weights(c.count.images * weights_per_image, c.weights, random);
    const auto maps = exact<float>(map_count * area);
    const auto evidence = exact<float>(map_count);
    const auto heatmaps = exact<float>(map_count * target.area());
    const auto pixels = exact<std::uint8_t>(c.count.images * target.area() * 3);
    const auto palette = exact<std::uint8_t>(256 * 3);
    const auto overlays = exact<std::uint8_t>(map_count * target.area() * 3);
    std::generate_n(pixels.get(), c.count.images * target.area() * 3, [&] { return static_cast<std::uint8_t>(random()); });
    std::generate_n(palette.get(), 256 * 3, [&] { return static_cast<std::uint8_t>(random()); });

    MapJob map_job{activations.batch(c.channels * area), weights.batch(weights_per_image), c.channel_order, c.weighting,
                   c.normalization, c.channels, maps.get(), evidence.get()};
    ViewJob view_job{maps.get(), c.size, target, heatmaps.get(), nullptr, 0, palette.get(), 0.25, nullptr};
    if (with_overlay) {
        view_job.pixels = pixels.get();
        view_job.pixels_stride = static_cast<std::ptrdiff_t>(target.area() * 3);
        view_job.overlays = overlays.get();
    }
    const auto bad = render(c.count, map_job, view_job, c.threads);
    check(!bad, c.name() + ": finite");

    const auto [expected, expected_evidence] = naive_maps(c, activations, weights);
    check(relative_error(expected_evidence, evidence.get()) <= 1e-5, c.name() + ": evidence");
    check(relative_error(expected, maps.get()) <= 1e-5, c.name() + ": maps");

    std::vector<double> expected_heat;
    for (std::size_t nk = 0; nk < map_count; ++nk) {
        for (std::size_t i = 0; i < target.area(); ++i) {
            const double y = (static_cast<double>(i / target.width) + 0.5) * static_cast<double>(c.size.height) /
                                 static_cast<double>(target.height) - 0.5;
            const double x = (static_cast<double>(i % target.width) + 0.5) * static_cast<double>(c.size.width) /
                                 static_cast<double>(target.width) - 0.5;
            expected_heat.push_back(naive_at(expected.data() + nk * area, c.size, y, x));
        }
    }
    check(relative_error(expected_heat, heatmaps.get()) <= 1e-5, c.name() + ": heatmaps");

    if (!with_overlay) return;
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < map_count * target.area(); ++i) {
        const std::size_t image = i / (c.count.maps * target.area());
        const double value = 255 * std::min(std::max(static_cast<double>(heatmaps[i]), 0.0), 1.0);
        for (std::size_t channel = 0; channel < 3; ++channel) {
            const std::uint8_t pixel = pixels[(image * target.area() + i % target.area()) * 3 + channel];
            const auto blend = [&](double index) {
                return std::nearbyint(0.75 * pixel + 0.25 * palette[static_cast<std::size_t>(index) * 3 + channel]);
            };
            // The product 255 * value is rounded to float32 before it is rounded to an index.
            const double slack = 255 * std::numeric_limits<float>::epsilon();
            const double actual = overlays[i * 3 + channel];
            wrong += actual != blend(std::nearbyint(value - std::min(value, slack))) &&
                     actual != blend(std::nearbyint(std::min(value + slack, 255.0)));
        }
    }
    check(wrong == 0, c.name() + ": overlays");
}

void test_shapes(std::mt19937& random) {
    const Size sizes[] = {{1, 1}, {1, 5}, {3, 2}, {3, 3}, {4, 4}, {1, 17}, {5, 5}, {7, 7}, {14, 14}, {21, 19}};
    const std::size_t channel_counts[] = {1, 3, 15, 16, 17, 40, 133};
    const Normalization normalizations[] = {Normalization::max, Normalization::minmax, Normalization::none};
    int turn = 0;
    for (const Size size : sizes) {
        for (const std::size_t channels : channel_counts) {
            for (const ChannelOrder layout : {ChannelOrder::channels_first, ChannelOrder::channels_last}) {
                for (const Weighting weighting : {Weighting::channel, Weighting::pooled, Weighting::element}) {
                    for (const Scalar activations : {Scalar::float32, Scalar::float16}) {
                        for (const Scalar weights : {Scalar::float32, Scalar::float16}) {
                            ++turn;
                            const std::size_t maps = static_cast<std::size_t>(turn) % 7 + 1;
                            const Size target = turn % 3 == 0 ? size : Size{static_cast<std::size_t>(turn) % 29 + 1, 23};
                            const Normalization normalization = normalizations[turn % 3];
                            run_case({{2, maps}, channels, size, layout, weighting, normalization, activations, weights, 2},
                                     target, normalization != Normalization::none, random);
                        }
                    }
                }
            }
        }
    }
}

// Large enough for panels, several blocks, slices, bands and threads.
void test_large(std::mt19937& random) {
    for (const ChannelOrder layout : {ChannelOrder::channels_first, ChannelOrder::channels_last}) {
        for (const std::size_t threads : {std::size_t{1}, std::size_t{4}}) {
            run_case({{1, 5}, 300, {31, 29}, layout, Weighting::channel, Normalization::max, Scalar::float32,
                      Scalar::float32, threads}, {300, 500}, true, random);
            run_case({{1, 6}, 70, {53, 57}, layout, Weighting::channel, Normalization::minmax, Scalar::float16,
                      Scalar::float16, threads}, {40, 50}, true, random);
            run_case({{5, 2}, 200, {13, 14}, layout, Weighting::pooled, Normalization::max, Scalar::float32,
                      Scalar::float16, threads}, {64, 64}, false, random);
            run_case({{1, 2}, 400, {20, 20}, layout, Weighting::element, Normalization::max, Scalar::float16,
                      Scalar::float32, threads}, {64, 64}, false, random);
        }
    }
}

void test_non_finite(std::mt19937& random) {
    const Case c{{3, 2}, 20, {5, 4}, ChannelOrder::channels_first, Weighting::channel, Normalization::max, Scalar::float32,
                 Scalar::float32, 2};
    for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                              -std::numeric_limits<float>::infinity()}) {
        Numbers activations(3 * 20 * 20, Scalar::float32, random);
        Numbers weights(3 * 2 * 20, Scalar::float32, random);
        weights.set((1 * 2 + 1) * 20 + 7, value);
        const auto maps = exact<float>(6 * 20);
        const auto evidence = exact<float>(6);
        const auto heatmaps = exact<float>(6 * 20);
        const MapJob map_job{activations.batch(400), weights.batch(40), c.channel_order, c.weighting, c.normalization, 20,
                             maps.get(), evidence.get()};
        const ViewJob view_job{maps.get(), c.size, c.size, heatmaps.get(), nullptr, 0, nullptr, 0, nullptr};
        check(render(c.count, map_job, view_job, 2) == std::size_t{3}, "non-finite weight names map 1 of image 1");
        activations.set(2 * 400 - 1, value);
        check(render(c.count, map_job, view_job, 2) == std::size_t{2}, "non-finite activation names image 1");
    }
    const auto maps = exact<float>(4);
    const auto heatmaps = exact<float>(4);
    std::fill_n(maps.get(), 4, 1.0f);
    maps[3] = 2 * view_limit;
    const ViewJob view_job{maps.get(), {1, 2}, {1, 2}, heatmaps.get(), nullptr, 0, nullptr, 0, nullptr};
    check(view({1, 2}, view_job, 2) == std::size_t{1}, "view names a map beyond its limit");
}

void test_empty() {
    const auto nothing = exact<float>(1);
    const MapJob map_job{{nothing.get(), 1, Scalar::float32}, {nothing.get(), 0, Scalar::float32},
                         ChannelOrder::channels_first, Weighting::channel, Normalization::max, 1, nullptr, nullptr};
    const ViewJob view_job{nullptr, {1, 1}, {2, 2}, nullptr, nullptr, 0, nullptr, 0, nullptr};
    check(!render({0, 3}, map_job, view_job, 4), "no images");
    check(!render({1, 0}, map_job, view_job, 4), "no maps");
    check(!view({0, 0}, view_job, 4), "nothing to view");
}

void test_pool() {
    ThreadPool pool;
    std::vector<std::atomic<int>> runs(1000);
    pool.run(runs.size(), 4, [&](std::size_t task) { ++runs[task]; });
    check(std::all_of(runs.begin(), runs.end(), [](const auto& count) { return count == 1; }), "each task runs once");

    std::atomic<int> others{0};
    bool caught = false;
    try {
        pool.run(100, 4, [&](std::size_t task) {
            if (task == 50) throw std::runtime_error("task 50");
            ++others;
        });
    } catch (const std::runtime_error& error) {
        caught = std::string(error.what()) == "task 50";
    }
    check(caught && others == 99, "an exception reaches the caller after the other tasks");

    std::atomic<int> total{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 8; ++caller) {
        callers.emplace_back([&] {
            for (int round = 0; round < 50; ++round) pool.run(10, 3, [&](std::size_t) { ++total; });
        });
    }
    for (std::thread& caller : callers) caller.join();
    check(total == 8 * 50 * 10, "many callers at once");
}

// For ThreadSanitizer: whole calls from many threads, whose maps do not depend on each other.
void test_calls_from_many_threads(std::mt19937& random) {
    constexpr std::size_t channels = 96;
    constexpr std::size_t area = 40 * 40;
    std::uniform_real_distribution<float> number(-1, 1);
    std::vector<float> activations(2 * channels * area), weights(2 * 2 * channels);
    std::generate(activations.begin(), activations.end(), [&] { return number(random); });
    std::generate(weights.begin(), weights.end(), [&] { return number(random); });
    const auto draw = [&](std::vector<float>& maps, std::vector<float>& heatmaps, std::size_t threads) {
        std::vector<float> evidence(4);
        const MapJob map_job{{activations.data(), channels * area, Scalar::float32},
                             {weights.data(), 2 * channels, Scalar::float32},
                             ChannelOrder::channels_first, Weighting::channel, Normalization::max, channels, maps.data(),
                             evidence.data()};
        const ViewJob view_job{maps.data(), {40, 40}, {100, 100}, heatmaps.data(), nullptr, 0, nullptr, 0, nullptr};
        return !render({2, 2}, map_job, view_job, threads);
    };
    std::vector<float> wanted_maps(4 * area), wanted(4 * 100 * 100);
    check(draw(wanted_maps, wanted, 1), "one thread");
    std::atomic<int> right{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 6; ++caller) {
        callers.emplace_back([&] {
            for (int round = 0; round < 5; ++round) {
                std::vector<float> maps(4 * area), heatmaps(4 * 100 * 100);
                right += draw(maps, heatmaps, 4) && maps == wanted_maps && heatmaps == wanted;
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    check(right == 30, "the same bits from many threads");
}

}  // namespace

void test_first_not_finite() {
    for (const std::size_t columns : {std::size_t{1}, std::size_t{7}, std::size_t{16}, std::size_t{65}}) {
        const std::size_t rows = 3;
        const std::unique_ptr<float[]> values(new float[rows * columns]);
        std::fill_n(values.get(), rows * columns, -std::numeric_limits<float>::max());
        check(!first_not_finite(values.get(), rows, columns), "every value is finite");
        for (std::size_t index = 0; index < rows * columns; ++index) {
            const float before = values[index];
            values[index] = index % 2 == 0 ? std::numeric_limits<float>::infinity() : std::nanf("");
            check(first_not_finite(values.get(), rows, columns) == index / columns, "the row that is not finite");
            values[index] = before;
        }
    }
}

// The triangle filter in double, without rounding in between: each of the two roundings is off by half a level.
double naive_resized(const std::uint8_t* pixels, Size source, Size target, std::size_t y, std::size_t x, std::size_t c) {
    const auto weight = [](std::size_t input, std::size_t inputs, std::size_t output, std::size_t outputs) {
        const double scale = static_cast<double>(inputs) / static_cast<double>(outputs);
        const double distance = static_cast<double>(input) + 0.5 - (static_cast<double>(output) + 0.5) * scale;
        return std::max(0.0, 1 - std::abs(distance) / std::max(scale, 1.0));
    };
    double total = 0;
    double weights = 0;
    for (std::size_t row = 0; row < source.height; ++row) {
        const double of_row = weight(row, source.height, y, target.height);
        for (std::size_t column = 0; of_row > 0 && column < source.width; ++column) {
            const double both = of_row * weight(column, source.width, x, target.width);
            total += both * pixels[(row * source.width + column) * 3 + c];
            weights += both;
        }
    }
    return total / weights;
}

void test_prepare(std::mt19937& random) {
    const Size sizes[] = {{1, 1}, {1, 7}, {6, 1}, {5, 9}, {16, 16}, {33, 20}, {90, 70}};
    const auto levels = exact<float>(3 * 256);
    for (std::size_t i = 0; i < 3 * 256; ++i) levels[i] = static_cast<float>(i);
    for (const Size source : sizes) {
        for (const Size target : sizes) {
            const auto pixels = exact<std::uint8_t>(source.area() * 3);
            std::generate_n(pixels.get(), source.area() * 3, [&] { return static_cast<std::uint8_t>(random()); });
            const auto input = exact<float>(target.area() * 3);
            const bool reversed = source.height % 2 == 0;
            for (const bool last : {false, true}) {
                prepare({pixels.get(), source, target, levels.get(), reversed, last, input.get()});
                double worst = 0;
                for (std::size_t i = 0; i < target.area() * 3; ++i) {
                    const std::size_t channel = last ? i % 3 : i / target.area();
                    const std::size_t place = last ? i / 3 : i % target.area();
                    const double expected = naive_resized(pixels.get(), source, target, place / target.width,
                                                          place % target.width, reversed ? 2 - channel : channel);
                    const double found = static_cast<double>(input[i]) - static_cast<double>(256 * channel);
                    worst = std::max(worst, std::abs(found - expected));
                }
                // Two roundings, and 22-bit weights.
                check(worst <= 1 + 1e-2, std::string(instruction_set()) + ": prepared picture");
            }
        }
    }
}

int main() {
    std::mt19937 random(1);
    for (const std::string_view name : instruction_sets()) {
        use_instruction_set(name);
        test_shapes(random);
        test_large(random);
        test_non_finite(random);
        test_empty();
        test_first_not_finite();
        test_prepare(random);
    }
    test_pool();
    test_calls_from_many_threads(random);
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
