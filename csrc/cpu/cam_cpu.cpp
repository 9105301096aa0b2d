#include "cam_cpu.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <new>

#include "instruction_sets.hpp"
#include "thread_pool.hpp"

namespace fastcam {
namespace {

struct Release {
    static constexpr std::align_val_t alignment{64};
    void operator()(float* data) const { ::operator delete(data, alignment); }
};

// Uninitialised floats, aligned for the widest vectors. Each thread keeps a few for its next task: memory fresh from
// the system costs a page fault per 4 KiB, more than the sums of a small image.
class Floats {
public:
    explicit Floats(std::size_t count) {
        for (Memory& kept : spare()) {
            if (kept.count >= count && kept.data) {
                std::swap(memory_, kept);
                return;
            }
        }
        void* const data = ::operator new(std::max<std::size_t>(count, 1) * sizeof(float), Release::alignment);
        memory_ = {std::unique_ptr<float, Release>(static_cast<float*>(data)), count};
    }
    ~Floats() {
        if (memory_.count > most_kept) return;
        for (Memory& kept : spare()) {
            if (kept.count < memory_.count) std::swap(memory_, kept);
        }
    }
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;

    float* get() const { return memory_.data.get(); }

private:
    struct Memory {
        std::unique_ptr<float, Release> data;
        std::size_t count = 0;
    };
    static constexpr std::size_t most_kept = std::size_t{1} << 20;

    static std::array<Memory, 4>& spare() {
        thread_local std::array<Memory, 4> memories;
        return memories;
    }

    Memory memory_;
};

constexpr std::size_t size_of(Scalar scalar) { return scalar == Scalar::float32 ? 4 : 2; }

const void* advance(const void* data, Scalar scalar, std::ptrdiff_t elements) {
    return static_cast<const std::byte*>(data) + elements * static_cast<std::ptrdiff_t>(size_of(scalar));
}

const void* image_of(const Batch& batch, std::size_t image) {
    return advance(batch.data, batch.scalar, static_cast<std::ptrdiff_t>(image) * batch.image_stride);
}

// The division of an image into slices depends only on its size, so that the order of summation, and with it every bit
// of the result, is the same for any number of threads.
constexpr std::size_t slice_bytes = std::size_t{1} << 19;
constexpr std::size_t most_slices = 16;
constexpr std::size_t groups_per_thread = 8;
constexpr std::size_t band_pixels = std::size_t{1} << 14;
// Below this, a second thread wakes up too late to help.
constexpr std::size_t bytes_worth_a_thread = std::size_t{1} << 20;

struct Span {
    std::size_t first;
    std::size_t count;
};

Span part_of(std::size_t total, std::size_t parts, std::size_t part) {
    const std::size_t first = total * part / parts;
    return {first, total * (part + 1) / parts - first};
}

// The weighted sums over channels, image by image and slice by slice.
class Maps {
public:
    Maps(const SimdKernels& kernels, Count count, const MapJob& job, Size size)
        : kernels_(kernels), count_(count), job_(job), area_(size.area()), slices_(choose_slices()) {}

    std::size_t slices() const { return slices_; }

    std::size_t bytes_per_image() const {
        const std::size_t per_map = job_.weighting == Weighting::channel ? job_.channels : job_.channels * area_;
        return job_.channels * area_ * size_of(job_.activations.scalar) +
               count_.maps * per_map * size_of(job_.weights.scalar);
    }

    // Floats that each slice except the first needs for its share.
    std::size_t share_size() const { return sums_channels() ? count_.maps * area_ : 0; }

    // Sums one slice: into the maps themselves, or into `share` if slices of channels cover the same pixels.
    void sum_slice(std::size_t image, std::size_t slice, float* share) const {
        if (sums_channels()) {
            sum_channels(image, part_of(job_.channels, slices_, slice), slice == 0 ? map_of(image, 0) : share);
        } else {
            sum_pixels(image, part_of(area_, slices_, slice));
        }
    }

    void add_share(std::size_t image, const float* share) const {
        kernels_.add(share, share_size(), map_of(image, 0));
    }

    // Normalises one map; false when it is not finite.
    bool finish(std::size_t image, std::size_t map) const {
        return kernels_.finish(map_of(image, map), area_, job_.normalization, job_.evidence + image * count_.maps + map);
    }

private:
    bool sums_channels() const { return job_.channel_order == ChannelOrder::channels_first; }

    std::size_t choose_slices() const {
        // Gradients with the channels last are pooled over all pixels first.
        if (!sums_channels() && job_.weighting == Weighting::pooled) return 1;
        const std::size_t divisible = sums_channels() ? job_.channels : area_;
        return std::clamp<std::size_t>(bytes_per_image() / slice_bytes, 1, std::min(most_slices, divisible));
    }

    float* map_of(std::size_t image, std::size_t map) const { return job_.maps + (image * count_.maps + map) * area_; }

    // Element `offset` of the weights of one image.
    const void* weights_at(std::size_t image, std::size_t offset) const {
        return advance(image_of(job_.weights, image), job_.weights.scalar, static_cast<std::ptrdiff_t>(offset));
    }

    int activations_type() const { return static_cast<int>(job_.activations.scalar); }
    int weights_type() const { return static_cast<int>(job_.weights.scalar); }

    // (A, channels) -> sums over the given channels, channels first.
    void sum_channels(std::size_t image, Span channels, float* sums) const {
        const void* rows = advance(image_of(job_.activations, image), job_.activations.scalar,
                                   static_cast<std::ptrdiff_t>(channels.first * area_));
        if (job_.weighting == Weighting::element) {
            const Floats scratch(scratch_floats(area_, count_.maps));
            kernels_.element_row_sum[activations_type()][weights_type()](
                rows, weights_at(image, channels.first * area_), channels.count, area_, job_.channels * area_,
                count_.maps, scratch.get(), sums, area_);
            return;
        }
        const Floats scratch(scratch_floats(area_, count_.maps));
        const auto add_up = [&](const float* coefficients, std::size_t stride) {
            kernels_.weighted_row_sum[activations_type()](rows, channels.count, area_, coefficients, stride, count_.maps,
                                                          scratch.get(), sums, area_);
        };
        if (weights_are_coefficients()) {
            add_up(static_cast<const float*>(weights_at(image, channels.first)), job_.channels);
            return;
        }
        const Floats coefficients(count_.maps * channels.count);
        for (std::size_t map = 0; map < count_.maps; ++map) {
            coefficients_of(image, map, channels, coefficients.get() + map * channels.count);
        }
        add_up(coefficients.get(), channels.count);
    }

    bool weights_are_coefficients() const {
        return job_.weighting == Weighting::channel && job_.weights.scalar == Scalar::float32;
    }

    // The weight of each channel as float32, channels first.
    void coefficients_of(std::size_t image, std::size_t map, Span channels, float* coefficients) const {
        const std::size_t first = map * job_.channels + channels.first;
        if (job_.weighting == Weighting::pooled) {
            kernels_.row_means[weights_type()](weights_at(image, first * area_), channels.count, area_, coefficients);
        } else {
            kernels_.half_to_float(static_cast<const std::uint16_t*>(weights_at(image, first)), channels.count,
                                   coefficients);
        }
    }

    // Dot products over the channels, for the given pixels, channels last.
    void sum_pixels(std::size_t image, Span pixels) const {
        const std::size_t channels = job_.channels;
        const void* rows = advance(image_of(job_.activations, image), job_.activations.scalar,
                                   static_cast<std::ptrdiff_t>(pixels.first * channels));
        float* const sums = map_of(image, 0) + pixels.first;
        if (job_.weighting == Weighting::element) {
            kernels_.row_dots[activations_type()][weights_type()](
                rows, pixels.count, channels, weights_at(image, pixels.first * channels), channels, area_ * channels,
                count_.maps, sums, area_);
            return;
        }
        const auto add_up = [&](const void* coefficients) {
            kernels_.row_dots[activations_type()][static_cast<int>(Scalar::float32)](
                rows, pixels.count, channels, coefficients, 0, channels, count_.maps, sums, area_);
        };
        if (weights_are_coefficients()) {
            add_up(weights_at(image, 0));
            return;
        }
        const Floats coefficients(count_.maps * channels);
        if (job_.weighting == Weighting::pooled) {
            pool_pixels(image, coefficients.get());
        } else {
            kernels_.half_to_float(static_cast<const std::uint16_t*>(weights_at(image, 0)), count_.maps * channels,
                                   coefficients.get());
        }
        add_up(coefficients.get());
    }

    // coefficients (maps, channels): means of the gradients over the pixels, channels last.
    void pool_pixels(std::size_t image, float* coefficients) const {
        const std::size_t channels = job_.channels;
        const Floats ones(area_);
        std::fill_n(ones.get(), area_, 1.0f);
        const Floats scratch(scratch_floats(channels, 1));
        for (std::size_t map = 0; map < count_.maps; ++map) {
            float* const sums = coefficients + map * channels;
            kernels_.weighted_row_sum[weights_type()](weights_at(image, map * area_ * channels), area_, channels,
                                                      ones.get(), 0, 1, scratch.get(), sums, channels);
            std::transform(sums, sums + channels, sums,
                           [this](float total) { return total / static_cast<float>(area_); });
        }
    }

    const SimdKernels& kernels_;
    const Count count_;
    const MapJob& job_;
    const std::size_t area_;
    const std::size_t slices_;
};

// Where an output position falls between two input positions: half-pixel centres, edges repeated.
struct Position {
    std::uint32_t low;
    std::uint32_t high;
    float fraction;
};

Position position(std::size_t output, std::size_t outputs, std::size_t inputs) {
    const double scale = static_cast<double>(inputs) / static_cast<double>(outputs);
    const double at = std::max(0.0, (static_cast<double>(output) + 0.5) * scale - 0.5);
    const std::size_t low = std::min(static_cast<std::size_t>(at), inputs - 1);
    const std::size_t high = std::min(low + 1, inputs - 1);
    return {static_cast<std::uint32_t>(low), static_cast<std::uint32_t>(high),
            static_cast<float>(at - static_cast<double>(low))};
}

// Resize, colour map and blend, band of rows by band of rows.
class Views {
public:
    Views(const SimdKernels& kernels, Count count, const ViewJob& job)
        : kernels_(kernels), count_(count), job_(job),
          same_size_(job.size.height == job.map_size.height && job.size.width == job.map_size.width),
          bands_(std::clamp<std::size_t>(job.size.area() / band_pixels, 1, job.size.height)), left_(job.size.width),
          right_(job.size.width), fraction_(job.size.width) {
        for (std::size_t x = 0; x < job.size.width; ++x) {
            const Position at = position(x, job.size.width, job.map_size.width);
            left_[x] = at.low;
            right_[x] = at.high;
            fraction_[x] = at.fraction;
        }
        for (std::size_t i = 0; job.overlays && i < tints_.size(); ++i) {
            for (std::size_t c = 0; c < 3; ++c) tints_[i].components[c] = job.alpha * job.palette[3 * i + c];
        }
    }

    std::size_t bands() const { return bands_; }

    // Measure of work: blending a pixel takes as long as reading about 32 bytes.
    std::size_t bytes_per_map() const {
        return job_.size.area() * ((job_.heatmaps ? sizeof(float) : 0) + (job_.overlays ? 32 : 0));
    }

    const float* map_of(std::size_t image, std::size_t map) const {
        return job_.maps + (image * count_.maps + map) * job_.map_size.area();
    }

    void draw_band(std::size_t image, std::size_t map, std::size_t band) const {
        const std::size_t width = job_.size.width;
        const std::size_t index = image * count_.maps + map;
        const Span rows = part_of(job_.size.height, bands_, band);
        const Floats scratch(3 * width);
        Lines lines{map_of(image, map), scratch.get(), scratch.get() + width};
        float* const spare_row = scratch.get() + 2 * width;
        std::vector<std::int32_t> blend_scratch(job_.overlays ? width : 0);
        for (std::size_t y = rows.first; y < rows.first + rows.count; ++y) {
            const std::size_t row = index * job_.size.height + y;
            float* const heat = job_.heatmaps ? job_.heatmaps + row * width : spare_row;
            draw_row(y, lines, heat);
            if (job_.overlays) {
                const std::uint8_t* pixels = job_.pixels + static_cast<std::ptrdiff_t>(image) * job_.pixels_stride;
                kernels_.blend_row(heat, pixels + y * width * 3, width, tints_.data(), 1 - job_.alpha,
                                   blend_scratch.data(), job_.overlays + row * width * 3);
            }
        }
    }

private:
    // The two rows of the map around the current output row, already resized to its width.
    struct Lines {
        const float* map;
        float* low;
        float* high;
        std::size_t low_row = unset;
        std::size_t high_row = unset;
        static constexpr std::size_t unset = static_cast<std::size_t>(-1);
    };

    void draw_row(std::size_t y, Lines& lines, float* heat) const {
        if (same_size_) {
            std::copy_n(lines.map + y * job_.size.width, job_.size.width, heat);
            return;
        }
        const Position at = position(y, job_.size.height, job_.map_size.height);
        if (lines.low_row != at.low && lines.high_row == at.low) {
            std::swap(lines.low, lines.high);
            std::swap(lines.low_row, lines.high_row);
        }
        stretch(lines.map, at.low, lines.low, lines.low_row);
        stretch(lines.map, at.high, lines.high, lines.high_row);
        kernels_.interpolate_rows(lines.low, lines.high, at.fraction, job_.size.width, heat);
    }

    void stretch(const float* map, std::size_t row, float* line, std::size_t& held_row) const {
        if (held_row == row) return;
        kernels_.interpolate_columns(map + row * job_.map_size.width, left_.data(), right_.data(), fraction_.data(),
                                     job_.size.width, line);
        held_row = row;
    }

    const SimdKernels& kernels_;
    const Count count_;
    const ViewJob& job_;
    const bool same_size_;
    const std::size_t bands_;
    std::vector<std::uint32_t> left_;
    std::vector<std::uint32_t> right_;
    std::vector<float> fraction_;
    std::array<Tint, 256> tints_{};
};

// The smallest index that any thread reports.
class First {
public:
    void report(std::size_t index) {
        std::size_t seen = index_;
        while (index < seen && !index_.compare_exchange_weak(seen, index)) {
        }
    }
    std::optional<std::size_t> get() const {
        return index_ == none ? std::nullopt : std::optional<std::size_t>(index_);
    }

private:
    static constexpr std::size_t none = static_cast<std::size_t>(-1);
    std::atomic<std::size_t> index_{none};
};

void for_each(std::size_t tasks, std::size_t threads, const std::function<void(std::size_t)>& body) {
    ThreadPool::of_process().run(tasks, threads, body);
}

}  // namespace

std::optional<std::size_t> render(Count count, const MapJob& map_job, const ViewJob& view_job, std::size_t threads) {
    const SimdKernels& kernels = chosen_kernels();
    const Maps maps(kernels, count, map_job, view_job.map_size);
    const Views views(kernels, count, view_job);
    First bad;
    const auto finish = [&](std::size_t index) {
        if (!maps.finish(index / count.maps, index % count.maps)) bad.report(index);
    };
    const auto draw = [&](std::size_t index, std::size_t band) {
        views.draw_band(index / count.maps, index % count.maps, band);
    };

    const std::size_t bytes = count.images * (maps.bytes_per_image() + count.maps * views.bytes_per_map());
    threads = std::min(threads, 1 + bytes / bytes_worth_a_thread);
    if (count.images >= threads) {
        const auto render_image = [&](std::size_t image) {
            maps.sum_slice(image, 0, nullptr);
            const Floats share(maps.slices() > 1 ? maps.share_size() : 0);
            for (std::size_t slice = 1; slice < maps.slices(); ++slice) {
                maps.sum_slice(image, slice, share.get());
                maps.add_share(image, share.get());
            }
            for (std::size_t map = 0; map < count.maps; ++map) {
                finish(image * count.maps + map);
                for (std::size_t band = 0; band < views.bands(); ++band) draw(image * count.maps + map, band);
            }
        };
        // Adjacent images on one thread: what the kernels prefetch at the end of an image is the start of the next.
        const std::size_t groups = std::min(count.images, groups_per_thread * threads);
        for_each(groups, threads, [&](std::size_t group) {
            const Span images = part_of(count.images, groups, group);
            for (std::size_t image = images.first; image < images.first + images.count; ++image) render_image(image);
        });
        return bad.get();
    }
    const std::size_t all_maps = count.images * count.maps;
    const std::size_t all_slices = count.images * maps.slices();
    const Floats shares(all_slices * maps.share_size());
    const auto share_of = [&](std::size_t index) { return shares.get() + index * maps.share_size(); };
    for_each(all_slices, threads,
             [&](std::size_t index) { maps.sum_slice(index / maps.slices(), index % maps.slices(), share_of(index)); });
    for (std::size_t index = 0; index < all_slices; ++index) {
        if (index % maps.slices() != 0) maps.add_share(index / maps.slices(), share_of(index));
    }
    for_each(all_maps, threads, finish);
    for_each(all_maps * views.bands(), threads,
             [&](std::size_t index) { draw(index / views.bands(), index % views.bands()); });
    return bad.get();
}

std::optional<std::size_t> view(Count count, const ViewJob& job, std::size_t threads) {
    const SimdKernels& kernels = chosen_kernels();
    const Views views(kernels, count, job);
    const std::size_t all_maps = count.images * count.maps;
    for (std::size_t index = 0; index < all_maps; ++index) {
        if (!kernels.within(views.map_of(0, index), job.map_size.area(), view_limit)) return index;
    }
    threads = std::min(threads, 1 + all_maps * views.bytes_per_map() / bytes_worth_a_thread);
    for_each(all_maps * views.bands(), threads, [&](std::size_t task) {
        const std::size_t index = task / views.bands();
        views.draw_band(index / count.maps, index % count.maps, task % views.bands());
    });
    return std::nullopt;
}

std::optional<std::size_t> first_not_finite(const float* values, std::size_t rows, std::size_t columns) {
    const SimdKernels& kernels = chosen_kernels();
    for (std::size_t row = 0; row < rows; ++row) {
        if (!kernels.within(values + row * columns, columns, std::numeric_limits<float>::max())) return row;
    }
    return std::nullopt;
}

}  // namespace fastcam
