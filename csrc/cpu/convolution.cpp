#include "convolution.hpp"

#include <algorithm>
#include <atomic>
#include <bitset>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <utility>

#include "convolution_kernels.hpp"
#include "huge_pages.hpp"
#include "instruction_sets.hpp"

namespace fastcam {
namespace {

constexpr std::size_t cache_line_floats = 16;
constexpr std::size_t alignment = 64;

constexpr std::size_t round_up(std::size_t count, std::size_t unit) { return (count + unit - 1) / unit * unit; }

// A stride of an odd number of cache lines: adjacent rows do not compete for the same cache lines.
constexpr std::size_t stride_for(std::size_t floats) {
    const std::size_t lines = round_up(floats, cache_line_floats) / cache_line_floats;
    return (lines | 1) * cache_line_floats;
}

// Floats on huge pages if there are enough of them: otherwise the kernels traverse hundreds of small pages.
class Floats {
public:
    explicit Floats(std::size_t count)
        : values_(static_cast<float*>(::operator new(bytes(count), unit(count))), Free{unit(count)}) {
        prefer_huge_pages(values_.get(), bytes(count));
    }

    float* get() const { return values_.get(); }

private:
    struct Free {
        std::align_val_t unit;
        void operator()(float* values) const { ::operator delete(values, unit); }
    };

    static std::size_t bytes(std::size_t count) { return std::max<std::size_t>(count, 1) * sizeof(float); }
    static std::align_val_t unit(std::size_t count) {
        return std::align_val_t{bytes(count) >= huge_page ? huge_page : alignment};
    }

    std::unique_ptr<float, Free> values_;
};

template <class Body>
void for_each(const ParallelFor& parallel, std::size_t tasks, const Body& body) {
    if (tasks == 0) return;
    const ParallelFor::Task task = [](void* context, std::size_t index) { (*static_cast<const Body*>(context))(index); };
    parallel.run(parallel.pool, tasks, task, const_cast<Body*>(&body));
}

// body(slot, task) for each task: tasks that run concurrently have different slots, hence separate scratch memory. A
// slot takes the next task when it has finished one, so that a slow processor takes fewer.
template <class Body>
void for_each_in_slots(const ParallelFor& parallel, std::size_t slots, std::size_t tasks, const Body& body) {
    std::atomic<std::size_t> next{0};
    for_each(parallel, std::min(slots, tasks), [&](std::size_t slot) {
        for (std::size_t task = next++; task < tasks; task = next++) body(slot, task);
    });
}

std::size_t slots_for(std::size_t threads) { return std::max<std::size_t>(threads, 1); }

// Part `index` of `count` items divided into `parts` parts of about equal size.
struct Range {
    std::size_t begin;
    std::size_t end;

    static Range part(std::size_t count, std::size_t parts, std::size_t index) {
        return {index * count / parts, (index + 1) * count / parts};
    }
    std::size_t size() const { return end - begin; }
};

// Layers with more input channels are split by positions: see WinogradPlan.
constexpr std::size_t most_channels_by_tiles = 128;

// The matrices of weights, one per position, divided into panels of columns: a panel is (depth, panel width). Columns
// are output channels; the last panel is padded with zeros to whole vectors. Panels are stored in the order in which
// they are used.
struct Panels {
    std::size_t lanes;
    std::size_t positions;
    std::size_t depth;
    std::size_t columns;

    std::size_t width() const { return panel_vectors * lanes; }
    std::size_t count() const { return (columns + width() - 1) / width(); }
    std::size_t first_column(std::size_t panel) const { return panel * width(); }
    std::size_t columns_of(std::size_t panel) const { return std::min(width(), columns - first_column(panel)); }
    std::size_t vectors_of(std::size_t panel) const { return (columns_of(panel) + lanes - 1) / lanes; }
    std::size_t padded_columns() const { return round_up(columns, lanes); }
    std::size_t floats() const { return positions * depth * padded_columns(); }

    std::size_t offset(std::size_t panel, std::size_t position) const {
        if (depth > most_channels_by_tiles) return (position * padded_columns() + first_column(panel)) * depth;
        return (positions * first_column(panel) + position * vectors_of(panel) * lanes) * depth;
    }
};

// The transform of the weights: (m + 2, 3), row by row.
struct WinogradShape {
    std::size_t results;
    const double* weights_transform;
    TileTransforms ConvolutionKernels::*transforms;

    std::size_t size() const { return results + 2; }
    std::size_t positions() const { return size() * size(); }
};

constexpr double weights_transform_4x4[] = {
    1 / 4.,  0,        0,        //
    -1 / 6., -1 / 6.,  -1 / 6.,  //
    -1 / 6., 1 / 6.,   -1 / 6.,  //
    1 / 24., 1 / 12.,  1 / 6.,   //
    1 / 24., -1 / 12., 1 / 6.,   //
    0,       0,        1,
};
constexpr double weights_transform_6x6[] = {
    1,        0,         0,        //
    -2 / 9.,  -2 / 9.,   -2 / 9.,  //
    -2 / 9.,  2 / 9.,    -2 / 9.,  //
    1 / 90.,  1 / 45.,   2 / 45.,  //
    1 / 90.,  -1 / 45.,  2 / 45.,  //
    32 / 45., 16 / 45.,  8 / 45.,  //
    32 / 45., -16 / 45., 8 / 45.,  //
    0,        0,         1,
};
constexpr WinogradShape winograd_4x4{4, weights_transform_4x4, &ConvolutionKernels::winograd_4x4};
constexpr WinogradShape winograd_6x6{6, weights_transform_6x6, &ConvolutionKernels::winograd_6x6};

const WinogradShape* winograd_shape(Algorithm algorithm) {
    switch (algorithm) {
        case Algorithm::winograd_4x4: return &winograd_4x4;
        case Algorithm::winograd_6x6: return &winograd_6x6;
        case Algorithm::pointwise:
        case Algorithm::gathered: break;
    }
    return nullptr;
}

Panels panels_for(const ConvolutionLayer& layer, Algorithm algorithm, std::size_t lanes) {
    const WinogradShape* shape = winograd_shape(algorithm);
    const std::size_t window = shape ? 1 : layer.kernel_height * layer.kernel_width;
    return {lanes, shape ? shape->positions() : 1, window * layer.input_channels, layer.output_channels};
}

bool is_winograd_layer(const ConvolutionLayer& layer) {
    return layer.kernel_height == 3 && layer.kernel_width == 3 && layer.stride == 1 && layer.pad_top == 1 &&
           layer.pad_left == 1 && layer.pad_bottom == 1 && layer.pad_right == 1 &&
           layer.input_layout == Layout::channels_last;
}

bool is_pointwise_layer(const ConvolutionLayer& layer) {
    return layer.kernel_height == 1 && layer.kernel_width == 1 && layer.pad_top == 0 && layer.pad_left == 0 &&
           layer.pad_bottom == 0 && layer.pad_right == 0 && layer.input_layout == Layout::channels_last;
}

// Maps with at least this many rows have enough 6x6 tiles for their larger transforms to pay off.
constexpr std::size_t least_rows_6x6 = 56;
// Below this, the transforms of Winograd's algorithm cost more than they save.
constexpr std::size_t least_winograd_channels = 16;
constexpr std::size_t most_channels_first = 4;

bool fits(const ConvolutionLayer& layer, Algorithm algorithm) {
    if (layer.input_channels == 0 || layer.output_channels == 0 || layer.kernel_height == 0 ||
        layer.kernel_width == 0 || layer.stride == 0 || !(layer.low <= layer.high)) {
        return false;
    }
    if (winograd_shape(algorithm)) return is_winograd_layer(layer) && !(layer.pool && layer.residual);
    if (layer.pool) return false;
    if (algorithm == Algorithm::pointwise) return is_pointwise_layer(layer);
    return layer.input_layout == Layout::channels_last || layer.input_channels <= most_channels_first;
}

Algorithm fastest_algorithm(const ConvolutionLayer& layer, std::size_t height) {
    if (is_pointwise_layer(layer)) return Algorithm::pointwise;
    const bool winograd = is_winograd_layer(layer) && (layer.pool || (layer.input_channels >= least_winograd_channels &&
                                                                      layer.output_channels >= least_winograd_channels));
    if (!winograd) return Algorithm::gathered;
    return height >= least_rows_6x6 ? Algorithm::winograd_6x6 : Algorithm::winograd_4x4;
}

struct Prepared {
    Prepared(const ConvolutionLayer& layer_, Algorithm algorithm_)
        : layer(layer_),
          algorithm(algorithm_),
          kernels(*chosen_kernels().convolution),
          panels(panels_for(layer_, algorithm_, kernels.lanes)),
          weights(panels.floats()),
          bias(panels.padded_columns()),
          zeros(layer_.input_channels) {
        std::fill_n(bias.get(), panels.padded_columns(), 0.0f);
        std::fill_n(zeros.get(), layer.input_channels, 0.0f);
    }

    const float* panel(std::size_t index, std::size_t position = 0) const {
        return weights.get() + panels.offset(index, position);
    }
    Finish finish(std::size_t channel, float scale = 1) const {
        return {bias.get() + channel, scale, layer.low, layer.high};
    }

    ConvolutionLayer layer;
    Algorithm algorithm;
    const ConvolutionKernels& kernels;
    Panels panels;
    Floats weights;
    Floats bias;
    Floats zeros;
};

// ---- weights

constexpr std::size_t widest_panel = panel_vectors * 16;

// One row of a panel: the weights of input channel `channel`, transformed, for the output channels of the panel.
void transform_weights(const Prepared& prepared, const WinogradShape& shape, const float* weights, std::size_t panel,
                       std::size_t channel) {
    constexpr std::size_t taps = 3;
    constexpr std::size_t most_size = 8;
    const Panels& panels = prepared.panels;
    const std::size_t width = panels.vectors_of(panel) * panels.lanes;
    const double* transform = shape.weights_transform;
    double kernel[taps][taps][widest_panel] = {};
    for (std::size_t column = 0; column < panels.columns_of(panel); ++column) {
        const float* source =
            weights + ((panels.first_column(panel) + column) * prepared.layer.input_channels + channel) * taps * taps;
        for (std::size_t tap = 0; tap < taps * taps; ++tap) kernel[tap / taps][tap % taps][column] = source[tap];
    }
    double half_way[most_size][taps][widest_panel];
    for (std::size_t i = 0; i < shape.size(); ++i) {
        for (std::size_t j = 0; j < taps; ++j) {
            for (std::size_t column = 0; column < width; ++column) {
                half_way[i][j][column] = transform[i * taps] * kernel[0][j][column] +
                                         transform[i * taps + 1] * kernel[1][j][column] +
                                         transform[i * taps + 2] * kernel[2][j][column];
            }
        }
    }
    for (std::size_t i = 0; i < shape.size(); ++i) {
        for (std::size_t j = 0; j < shape.size(); ++j) {
            float* target =
                prepared.weights.get() + panels.offset(panel, i * shape.size() + j) + channel * width;
            for (std::size_t column = 0; column < width; ++column) {
                target[column] = static_cast<float>(half_way[i][0][column] * transform[j * taps] +
                                                    half_way[i][1][column] * transform[j * taps + 1] +
                                                    half_way[i][2][column] * transform[j * taps + 2]);
            }
        }
    }
}

// The panel's weights in the order in which windows are gathered: following the input's memory layout.
void pack_weights(const Prepared& prepared, const float* weights, std::size_t panel) {
    const Panels& panels = prepared.panels;
    const ConvolutionLayer& layer = prepared.layer;
    const std::size_t window = layer.kernel_height * layer.kernel_width;
    const std::size_t width = panels.vectors_of(panel) * panels.lanes;
    float* target = prepared.weights.get() + panels.offset(panel, 0);
    std::fill_n(target, panels.depth * width, 0.0f);
    for (std::size_t column = 0; column < panels.columns_of(panel); ++column) {
        const float* source = weights + (panels.first_column(panel) + column) * panels.depth;
        for (std::size_t channel = 0; channel < layer.input_channels; ++channel) {
            for (std::size_t tap = 0; tap < window; ++tap) {
                const bool last = layer.input_layout == Layout::channels_last;
                const std::size_t row = last ? tap * layer.input_channels + channel : channel * window + tap;
                target[row * width + column] = source[channel * window + tap];
            }
        }
    }
}

void prepare_weights(const Prepared& prepared, const float* weights, const ParallelFor& parallel) {
    const std::size_t count = prepared.panels.count();
    const WinogradShape* shape = winograd_shape(prepared.algorithm);
    if (!shape) {
        for_each(parallel, count, [&](std::size_t panel) { pack_weights(prepared, weights, panel); });
        return;
    }
    constexpr std::size_t channels_per_task = 32;
    const std::size_t channels = prepared.layer.input_channels;
    const std::size_t parts = (channels + channels_per_task - 1) / channels_per_task;
    for_each(parallel, count * parts, [&](std::size_t task) {
        const Range part = Range::part(channels, parts, task % parts);
        for (std::size_t channel = part.begin; channel < part.end; ++channel) {
            transform_weights(prepared, *shape, weights, task / parts, channel);
        }
    });
}

// ---- one call

struct Call {
    const Prepared& prepared;
    const float* input;
    const float* residual;
    float* output;
    std::size_t batch;
    std::size_t height;
    std::size_t width;
    OutputSize output_size;
    float* scratch;
    ParallelFor parallel;
};

// ---- Winograd

// How the outputs of a batch are divided into tiles. Tiles are numbered across all images.
struct Tiles {
    std::size_t results;
    std::size_t down;
    std::size_t across;
    std::size_t count;

    Tiles(const WinogradShape& shape, std::size_t batch, std::size_t height, std::size_t width)
        : results(shape.results),
          down((height + results - 1) / results),
          across((width + results - 1) / results),
          count(batch * down * across) {}

    std::size_t image(std::size_t tile) const { return tile / (down * across); }
    std::size_t row(std::size_t tile) const { return tile % (down * across) / across * results; }
    std::size_t column(std::size_t tile) const { return tile % across * results; }
};

// Transformed inputs, (positions, tiles, channels), and their products with the weights, (positions, tiles, columns),
// of the tiles that are computed at a time.
struct TileMemory {
    std::size_t input_stride;  // from tile to tile
    std::size_t input_position_stride;
    std::size_t product_stride;
    std::size_t product_position_stride;
    std::size_t floats;

    TileMemory(const Panels& panels, std::size_t tiles, std::size_t columns)
        : input_stride(stride_for(panels.depth)),
          input_position_stride(stride_for(tiles * input_stride)),
          product_stride(stride_for(columns)),
          product_position_stride(stride_for(tiles * product_stride)),
          floats(panels.positions * (input_position_stride + product_position_stride)) {}
};

constexpr std::size_t most_tiles_by_tiles = 56;

// How the tiles of a call are processed; results do not depend on it.
//
// Split by tiles: a task does everything for some tiles, panel by panel, in memory that stays in its processor's L2
// cache. Every task reads all weights, so this is for few channels.
// Split by positions: three passes over some tiles (inputs, products, outputs), with one product matrix per position
// and panels as a task; every weight is read once per pass.
struct WinogradPlan {
    bool by_tiles;
    std::size_t passes;          // by positions: groups of tiles, one after the other; by tiles: tasks
    std::size_t tiles_per_pass;  // at most
    std::size_t columns;         // of products in memory at a time
    std::size_t slots;           // memories

    WinogradPlan(const Prepared& prepared, const Tiles& tiles, std::size_t threads) {
        constexpr std::size_t most_cached_floats = std::size_t{288} << 10;
        const Panels& panels = prepared.panels;
        // Tiles are rows of a product. With fewer at a time, fetching the weights would take too long.
        const std::size_t block = round_up(12, prepared.kernels.most_rows);
        const std::size_t tiles_by_positions = 9 * block;
        const std::size_t busy = 4 * slots_for(threads);
        by_tiles = panels.depth <= most_channels_by_tiles && tiles.count >= busy * block / 2;
        if (by_tiles) {
            const std::size_t floats_per_tile = panels.positions * stride_for(panels.depth);
            const std::size_t fitting =
                std::clamp(most_cached_floats / floats_per_tile / block, std::size_t{1}, most_tiles_by_tiles / block) * block;
            const std::size_t most = std::min(fitting, std::max(block, round_up(tiles.count / busy, block)));
            passes = (tiles.count + most - 1) / most;
        } else {
            passes = (tiles.count + tiles_by_positions - 1) / tiles_by_positions;
        }
        tiles_per_pass = passes ? (tiles.count + passes - 1) / passes : 0;
        columns = by_tiles ? std::min(panels.width(), panels.padded_columns()) : panels.padded_columns();
        slots = by_tiles ? std::min(slots_for(threads), passes) : 1;
    }
};

class WinogradCall {
public:
    WinogradCall(const Call& call, const WinogradShape& shape)
        : call_(call),
          prepared_(call.prepared),
          panels_(call.prepared.panels),
          transforms_(call.prepared.kernels.*shape.transforms),
          tiles_(shape, call.batch, call.height, call.width),
          plan_(prepared_, tiles_, call.parallel.threads),
          memory_(panels_, plan_.tiles_per_pass, plan_.columns) {}

    static std::size_t scratch_floats(const Prepared& prepared, const WinogradShape& shape, std::size_t batch,
                                      std::size_t height, std::size_t width, std::size_t threads) {
        const Tiles tiles(shape, batch, height, width);
        const WinogradPlan plan(prepared, tiles, threads);
        return plan.slots * TileMemory(prepared.panels, plan.tiles_per_pass, plan.columns).floats;
    }

    void run() const {
        if (plan_.by_tiles) {
            run_by_tiles();
        } else {
            for (std::size_t pass = 0; pass < plan_.passes; ++pass) {
                run_by_positions(Range::part(tiles_.count, plan_.passes, pass));
            }
        }
    }

private:
    // Direct convolution of inputs up to the largest float stays finite as long as the result is; the transforms add up
    // to 225 times the largest input, and their inverse up to 4500 times the largest product. A tile with results that
    // are not finite is computed again with its inputs scaled by a power of two, which changes none of their digits.
    static constexpr float rescue_scale = 0x1p-60f;

    float* inputs(std::size_t slot) const { return call_.scratch + slot * memory_.floats; }
    float* products(std::size_t slot) const { return inputs(slot) + panels_.positions * memory_.input_position_stride; }

    void run_by_tiles() const {
        for_each_in_slots(call_.parallel, plan_.slots, plan_.passes, [&](std::size_t slot, std::size_t pass) {
            const Range range = Range::part(tiles_.count, plan_.passes, pass);
            for (std::size_t i = 0; i < range.size(); ++i) transform_input(slot, i, range.begin + i, 1);
            std::bitset<most_tiles_by_tiles> not_finite;
            for (std::size_t panel = 0; panel < panels_.count(); ++panel) {
                for (std::size_t position = 0; position < panels_.positions; ++position) {
                    multiply(slot, position, panel, {0, range.size()});
                }
                for (std::size_t i = 0; i < range.size(); ++i) {
                    if (!transform_output(slot, i, range.begin + i, {panel, panel + 1}, 1)) not_finite.set(i);
                }
            }
            for (std::size_t i = 0; not_finite.any() && i < range.size(); ++i) {
                if (not_finite.test(i)) rescue(slot, i, range.begin + i);
            }
        });
    }

    void run_by_positions(Range range) const {
        constexpr std::size_t slot = 0;
        const std::size_t busy = 16 * slots_for(call_.parallel.threads);
        const std::size_t parts = std::min(range.size(), busy);
        for_each(call_.parallel, parts, [&](std::size_t task) {
            const Range part = Range::part(range.size(), parts, task);
            for (std::size_t i = part.begin; i < part.end; ++i) transform_input(slot, i, range.begin + i, 1);
        });
        const std::size_t groups = std::min((busy + panels_.positions - 1) / panels_.positions, panels_.count());
        for_each(call_.parallel, panels_.positions * groups, [&](std::size_t task) {
            const Range group = Range::part(panels_.count(), groups, task % groups);
            for (std::size_t panel = group.begin; panel < group.end; ++panel) {
                multiply(slot, task / groups, panel, {0, range.size()});
            }
        });
        for_each(call_.parallel, parts, [&](std::size_t task) {
            const Range part = Range::part(range.size(), parts, task);
            for (std::size_t i = part.begin; i < part.end; ++i) {
                if (!transform_output(slot, i, range.begin + i, {0, panels_.count()}, 1)) rescue(slot, i, range.begin + i);
            }
        });
    }

    // Offset of a panel's products in a row of products.
    std::size_t product_column(std::size_t panel) const { return plan_.by_tiles ? 0 : panels_.first_column(panel); }

    void transform_input(std::size_t slot, std::size_t index, std::size_t tile, float scale) const {
        const ConvolutionLayer& layer = prepared_.layer;
        transforms_.input({call_.input + tiles_.image(tile) * call_.height * call_.width * layer.input_channels,
                           call_.height, call_.width, layer.input_channels,
                           static_cast<std::ptrdiff_t>(tiles_.row(tile)) - 1,
                           static_cast<std::ptrdiff_t>(tiles_.column(tile)) - 1, prepared_.zeros.get(), scale,
                           inputs(slot) + index * memory_.input_stride, memory_.input_position_stride});
    }

    void multiply(std::size_t slot, std::size_t position, std::size_t panel, Range rows) const {
        prepared_.kernels.multiply(
            {inputs(slot) + position * memory_.input_position_stride + rows.begin * memory_.input_stride,
             memory_.input_stride, prepared_.panel(panel, position), panels_.depth, panels_.vectors_of(panel),
             rows.size(),
             products(slot) + position * memory_.product_position_stride + rows.begin * memory_.product_stride +
                 product_column(panel),
             memory_.product_stride});
    }

    // Whether all results are finite.
    bool transform_output(std::size_t slot, std::size_t index, std::size_t tile, Range panels, float scale) const {
        const std::size_t channels = prepared_.layer.output_channels;
        const std::size_t channel = panels_.first_column(panels.begin);
        const std::size_t end = std::min(panels_.first_column(panels.end), channels);
        const std::size_t row = tiles_.row(tile);
        const std::size_t column = tiles_.column(tile);
        const std::size_t shrink = prepared_.layer.pool ? 2 : 1;
        const OutputSize size = call_.output_size;
        const std::size_t first =
            ((tiles_.image(tile) * size.height + row / shrink) * size.width + column / shrink) * channels + channel;
        return transforms_.output(
            {products(slot) + index * memory_.product_stride + product_column(panels.begin),
             memory_.product_position_stride, end - channel, std::min(call_.height - row, tiles_.results),
             std::min(call_.width - column, tiles_.results), call_.output + first,
             call_.residual ? call_.residual + first : nullptr, size.width * channels, channels,
             prepared_.layer.pool},
            prepared_.finish(channel, scale));
    }

    void rescue(std::size_t slot, std::size_t index, std::size_t tile) const {
        transform_input(slot, index, tile, rescue_scale);
        for (std::size_t panel = 0; panel < panels_.count(); ++panel) {
            for (std::size_t position = 0; position < panels_.positions; ++position) {
                multiply(slot, position, panel, {index, index + 1});
            }
            transform_output(slot, index, tile, {panel, panel + 1}, 1 / rescue_scale);
        }
    }

    const Call& call_;
    const Prepared& prepared_;
    const Panels& panels_;
    const TileTransforms& transforms_;
    Tiles tiles_;
    WinogradPlan plan_;
    TileMemory memory_;
};

// ---- matrix products

// How the results of a call are divided: rows are the pixels of the output, columns its channels.
struct ProductPlan {
    bool gather;
    std::size_t row_parts;
    std::size_t rows_per_part;  // at most
    std::size_t column_parts;
    std::size_t left_stride;  // of gathered windows
    std::size_t left_floats;
    std::size_t slots;

    ProductPlan(const Prepared& prepared, std::size_t rows, std::size_t threads) {
        constexpr std::size_t most_cached_floats = std::size_t{256} << 10;
        constexpr std::size_t most_blocks = 8;
        // Rows that are a multiple of this apart compete for the same lines of the L1 cache.
        constexpr std::size_t bad_stride = 1024;
        const ConvolutionLayer& layer = prepared.layer;
        const Panels& panels = prepared.panels;
        const std::size_t block = prepared.kernels.most_rows;
        gather = prepared.algorithm == Algorithm::gathered || layer.stride != 1 || panels.depth % bad_stride == 0;
        const std::size_t most =
            std::clamp(most_cached_floats / panels.depth / block, std::size_t{1}, most_blocks) * block;
        row_parts = (rows + most - 1) / most;
        rows_per_part = row_parts ? (rows + row_parts - 1) / row_parts : 0;
        const std::size_t busy = 4 * slots_for(threads);
        column_parts = row_parts ? std::min((busy + row_parts - 1) / row_parts, panels.count()) : 1;
        left_stride = stride_for(layer.input_layout == Layout::channels_last ? panels.depth : rows_per_part);
        left_floats = left_stride * (layer.input_layout == Layout::channels_last ? rows_per_part : panels.depth);
        slots = std::min(slots_for(threads), row_parts * column_parts);
    }

    std::size_t scratch_floats() const { return gather ? slots * left_floats : 0; }
};

class ProductCall {
public:
    explicit ProductCall(const Call& call)
        : call_(call),
          prepared_(call.prepared),
          layer_(call.prepared.layer),
          panels_(call.prepared.panels),
          rows_(call.batch * call.output_size.height * call.output_size.width),
          plan_(prepared_, rows_, call.parallel.threads) {}

    void run() const {
        for_each_in_slots(
            call_.parallel, plan_.slots, plan_.row_parts * plan_.column_parts, [&](std::size_t slot, std::size_t task) {
                const Range rows = Range::part(rows_, plan_.row_parts, task / plan_.column_parts);
                const Range panels = Range::part(panels_.count(), plan_.column_parts, task % plan_.column_parts);
                const float* left = call_.input + rows.begin * panels_.depth;
                std::size_t left_stride = panels_.depth;
                if (plan_.gather) {
                    float* windows = call_.scratch + slot * plan_.left_floats;
                    gather(rows, windows);
                    left = windows;
                    left_stride = plan_.left_stride;
                }
                for (std::size_t panel = panels.begin; panel < panels.end; ++panel) {
                    multiply(left, left_stride, rows, panel);
                }
            });
    }

private:
    void multiply(const float* left, std::size_t left_stride, Range rows, std::size_t panel) const {
        const std::size_t channels = layer_.output_channels;
        const std::size_t channel = panels_.first_column(panel);
        const std::size_t first = rows.begin * channels + channel;
        const auto kernel = layer_.input_layout == Layout::channels_last ? prepared_.kernels.multiply_finished
                                                                         : prepared_.kernels.multiply_columns_finished;
        kernel({left, left_stride, prepared_.panel(panel), panels_.depth, panels_.vectors_of(panel), rows.size(),
                call_.output + first, channels},
               {call_.residual ? call_.residual + first : nullptr, panels_.columns_of(panel)},
               prepared_.finish(channel));
    }

    // Adjacent results of one row of one image.
    struct Run {
        std::size_t image;
        std::size_t row;
        Range columns;
        std::size_t first;  // index of the first result among those that are gathered
    };

    void gather(Range rows, float* windows) const {
        const std::size_t width = call_.output_size.width;
        for (std::size_t row = rows.begin; row < rows.end;) {
            const std::size_t line = row / width;
            const std::size_t column = row % width;
            const std::size_t count = std::min(width - column, rows.end - row);
            const Run run{line / call_.output_size.height, line % call_.output_size.height, {column, column + count},
                          row - rows.begin};
            if (layer_.input_layout == Layout::channels_last) {
                gather_rows(run, windows);
            } else {
                gather_columns(run, windows);
            }
            row += count;
        }
    }

    // Position in the input of a window's first row or column plus `tap`; positions before the first wrap to very large
    // numbers.
    static std::size_t tapped(std::size_t result, std::size_t stride, std::size_t tap, std::size_t pad) {
        return result * stride + tap - pad;
    }

    void gather_rows(const Run& run, float* windows) const {
        const std::size_t channels = layer_.input_channels;
        const std::size_t part = layer_.kernel_width * channels;
        for (std::size_t column = run.columns.begin; column < run.columns.end; ++column) {
            float* target = windows + (run.first + column - run.columns.begin) * plan_.left_stride;
            // Taps inside the image: [begin, end).
            const std::size_t start = column * layer_.stride;
            const std::size_t begin = std::min(layer_.pad_left - std::min(layer_.pad_left, start), layer_.kernel_width);
            const std::size_t inside = call_.width + layer_.pad_left - std::min(call_.width + layer_.pad_left, start);
            const std::size_t end = std::max(begin, std::min(layer_.kernel_width, inside));
            for (std::size_t tap = 0; tap < layer_.kernel_height; ++tap, target += part) {
                const std::size_t y = tapped(run.row, layer_.stride, tap, layer_.pad_top);
                if (y >= call_.height || begin == end) {
                    std::fill_n(target, part, 0.0f);
                    continue;
                }
                const float* source =
                    call_.input + ((run.image * call_.height + y) * call_.width + start + begin - layer_.pad_left) * channels;
                std::fill_n(target, begin * channels, 0.0f);
                std::copy_n(source, (end - begin) * channels, target + begin * channels);
                std::fill_n(target + end * channels, (layer_.kernel_width - end) * channels, 0.0f);
            }
        }
    }

    void gather_columns(const Run& run, float* windows) const {
        float* target = windows + run.first;
        for (std::size_t channel = 0; channel < layer_.input_channels; ++channel) {
            const float* image = call_.input + (run.image * layer_.input_channels + channel) * call_.height * call_.width;
            for (std::size_t i = 0; i < layer_.kernel_height; ++i) {
                const std::size_t y = tapped(run.row, layer_.stride, i, layer_.pad_top);
                for (std::size_t j = 0; j < layer_.kernel_width; ++j, target += plan_.left_stride) {
                    if (y < call_.height) {
                        gather_line(image + y * call_.width, j, run.columns, target);
                    } else {
                        std::fill_n(target, run.columns.size(), 0.0f);
                    }
                }
            }
        }
    }

    // One row of the input as tap `tap` of the windows of `columns` sees it.
    void gather_line(const float* line, std::size_t tap, Range columns, float* target) const {
        const std::size_t stride = layer_.stride;
        // Columns whose tap is inside the image: [begin, end).
        const std::size_t before = layer_.pad_left - std::min(layer_.pad_left, tap);
        const std::size_t inside = call_.width + layer_.pad_left - std::min(call_.width + layer_.pad_left, tap);
        const std::size_t begin = std::clamp((before + stride - 1) / stride, columns.begin, columns.end);
        const std::size_t end = std::clamp((inside + stride - 1) / stride, begin, columns.end);
        std::fill_n(target, begin - columns.begin, 0.0f);
        target += begin - columns.begin;
        if (stride == 1) {
            std::copy_n(line + tapped(begin, 1, tap, layer_.pad_left), end - begin, target);
        } else {
            for (std::size_t i = 0; i < end - begin; ++i) target[i] = line[tapped(begin + i, stride, tap, layer_.pad_left)];
        }
        std::fill_n(target + (end - begin), columns.end - end, 0.0f);
    }

    const Call& call_;
    const Prepared& prepared_;
    const ConvolutionLayer& layer_;
    const Panels& panels_;
    std::size_t rows_;
    ProductPlan plan_;
};

std::size_t output_extent(std::size_t input, std::size_t before, std::size_t after, std::size_t kernel,
                          std::size_t stride) {
    const std::size_t padded = input + before + after;
    return input == 0 || padded < kernel ? 0 : (padded - kernel) / stride + 1;
}

float* aligned(void* memory) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    return reinterpret_cast<float*>(round_up(address, alignment));
}

}  // namespace

struct Convolution::State {
    Prepared prepared;
};

bool convolution_supported() {
#if defined(__aarch64__)
    return true;
#else
    return chosen_kernels().convolution->lanes > baseline_kernels.convolution->lanes;
#endif
}

std::optional<Algorithm> choose_algorithm(const ConvolutionLayer& layer, std::size_t height, std::size_t width) {
    static_cast<void>(width);
    const Algorithm algorithm = fastest_algorithm(layer, height);
    if (!convolution_supported() || !fits(layer, algorithm)) return std::nullopt;
    return algorithm;
}

std::size_t Convolution::prepared_bytes(const ConvolutionLayer& layer, Algorithm algorithm) {
    return panels_for(layer, algorithm, chosen_kernels().convolution->lanes).floats() * sizeof(float);
}

Convolution::Convolution(const ConvolutionLayer& layer, Algorithm algorithm, const float* weights, const float* bias,
                         const ParallelFor& parallel) {
    if (!fits(layer, algorithm)) throw std::invalid_argument("the algorithm does not fit the convolution layer");
    auto state = std::make_unique<State>(State{Prepared(layer, algorithm)});
    prepare_weights(state->prepared, weights, parallel);
    if (bias) std::copy_n(bias, layer.output_channels, state->prepared.bias.get());
    state_ = std::move(state);
}

Convolution::~Convolution() = default;
Convolution::Convolution(Convolution&&) noexcept = default;
Convolution& Convolution::operator=(Convolution&&) noexcept = default;

const ConvolutionLayer& Convolution::layer() const { return state_->prepared.layer; }
Algorithm Convolution::algorithm() const { return state_->prepared.algorithm; }

OutputSize Convolution::output_size(std::size_t height, std::size_t width) const {
    const ConvolutionLayer& layer = state_->prepared.layer;
    const std::size_t shrink = layer.pool ? 2 : 1;
    return {output_extent(height, layer.pad_top, layer.pad_bottom, layer.kernel_height, layer.stride) / shrink,
            output_extent(width, layer.pad_left, layer.pad_right, layer.kernel_width, layer.stride) / shrink};
}

std::size_t Convolution::scratch_bytes(std::size_t batch, std::size_t height, std::size_t width,
                                       std::size_t threads) const {
    const Prepared& prepared = state_->prepared;
    const OutputSize size = output_size(height, width);
    const WinogradShape* shape = winograd_shape(prepared.algorithm);
    const std::size_t floats =
        shape ? WinogradCall::scratch_floats(prepared, *shape, batch, height, width, threads)
              : ProductPlan(prepared, batch * size.height * size.width, threads).scratch_floats();
    return floats * sizeof(float) + alignment;
}

void Convolution::run(const float* input, const float* residual, float* output, std::size_t batch, std::size_t height,
                      std::size_t width, void* scratch, const ParallelFor& parallel) const {
    const OutputSize size = output_size(height, width);
    if (batch * size.height * size.width == 0) return;
    prefer_huge_pages(output, batch * size.height * size.width * layer().output_channels * sizeof(float));
    prefer_huge_pages(scratch, scratch_bytes(batch, height, width, parallel.threads));
    const Call call{state_->prepared, input, residual, output, batch, height, width, size, aligned(scratch), parallel};
    if (const WinogradShape* shape = winograd_shape(call.prepared.algorithm)) {
        WinogradCall(call, *shape).run();
    } else {
        ProductCall(call).run();
    }
}

}  // namespace fastcam
