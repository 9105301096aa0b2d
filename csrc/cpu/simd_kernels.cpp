// Compiled once per instruction set; FASTCAM_KERNELS names the table that this compilation defines,
// FASTCAM_CONVOLUTION_KERNELS that of convolution_kernels.cpp.
#include "simd_kernels.hpp"

#include "simd.hpp"

namespace fastcam {
namespace {

// The contents of one tile, in registers: sums of maps x vectors (channels first) or maps x rows (channels last).
constexpr std::size_t tile_maps = 4;
#if defined(__AVX512F__)
constexpr std::size_t tile_vectors = 6;  // 24 sums + 6 vectors of a row + 1 coefficient of the 32 registers
constexpr std::size_t tile_rows = 4;
#else
constexpr std::size_t tile_vectors = 3;  // 12 + 3 + 1 of 16
constexpr std::size_t tile_rows = 2;
#endif

// How far ahead of the dot products memory is prefetched.
constexpr std::size_t dot_prefetch_bytes = 16 * 1024;

// Rows per partial sum. Sums of sums lose less to rounding than one long sum.
constexpr std::size_t most_rows_per_block = 128;

// How the columns of a row are divided into vectors. The last vector starts early enough to end with the row; the
// columns that it shares with the one before are computed twice, in separate places of the scratch memory.
struct Columns {
    std::size_t count;

    std::size_t vectors() const { return (count + lanes - 1) / lanes; }
    std::size_t start(std::size_t vector) const { return count < lanes ? 0 : least(vector * lanes, count - lanes); }
};

// Adjacent vectors of a row, few enough for a block of rows to stay in the cache while each map uses it: each row is
// read from memory once.
struct Panel {
    Columns columns;
    std::size_t first;
    std::size_t vectors;

    std::size_t origin() const { return columns.start(first); }
    // From `origin`, in elements.
    std::size_t start(std::size_t vector) const { return columns.start(first + vector) - origin(); }
    std::size_t width() const { return least(start(vectors - 1) + lanes, columns.count); }
    // Blocks of about equal height: the last one prefetches as much of the next image as its first block needs.
    std::size_t rows_per_block(std::size_t rows) const {
        const std::size_t most = least(block_floats / width(), most_rows_per_block);
        const std::size_t blocks = (rows + most - 1) / most;
        return (rows + blocks - 1) / blocks;
    }

    // Reorders sums from vector by vector to column by column.
    void unpack(const float* scratch, float* sums) const {
        if (columns.count < lanes) {
            for (std::size_t column = 0; column < columns.count; ++column) sums[column] = scratch[column];
            return;
        }
        for (std::size_t v = 0; v < vectors; ++v) store(load(scratch + v * lanes), sums + origin() + start(v));
    }
};

template <class Body>
inline void for_each_panel(Columns columns, const Body& body) {
    constexpr std::size_t most_vectors = panel_columns / lanes;
    for (std::size_t first = 0; first < columns.vectors(); first += most_vectors) {
        body(Panel{columns, first, least(most_vectors, columns.vectors() - first)});
    }
}

struct LoadWhole {
    template <class T>
    Vector operator()(const T* source) const {
        return load(source);
    }
};

struct LoadFew {
    std::size_t count;
    template <class T>
    Vector operator()(const T* source) const {
        return load_few(source, count);
    }
};

// Into the L2 cache: two blocks do not fit into L1.
template <class T>
inline void prefetch(const T* from, std::size_t elements_ahead) {
    // An address past the array is harmless here; it is computed as an integer because such a pointer must not be
    // formed.
    const auto address = reinterpret_cast<std::uintptr_t>(from) + elements_ahead * sizeof(T);
    __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
}

// Prefetches what adjacent vectors, starting at `starts`, will read `elements_ahead`: one request per cache line.
template <std::size_t Count, class T>
inline void prefetch_all(const T* row, const std::size_t (&starts)[Count], std::size_t elements_ahead) {
    constexpr std::size_t vectors_per_line = 64 / (lanes * sizeof(T));
    for (std::size_t v = 0; v < Count; v += vectors_per_line) prefetch(row + starts[v], elements_ahead);
}

// Rows of a panel; `first` is its origin in the first row.
template <class T>
struct Block {
    const T* first;
    std::size_t rows;
    std::size_t stride;
    std::size_t prefetch_ahead;  // elements from this block to the next; 0: none
};

// While a block is computed, the next one is prefetched: of each `count` rows, turn `index` fetches one, so that memory
// stays busy during the turns of all maps.
struct Turn {
    std::size_t index;
    std::size_t count;
};

// (maps, rows) weights, `stride` floats from map to map.
struct Coefficients {
    const float* first;
    std::size_t stride;
};

template <std::size_t Value>
struct Constant {
    static constexpr std::size_t value = Value;
};

template <std::size_t Count>
inline void add_to(const Vector (&sums)[Count], float* target) {
#pragma GCC unroll 8
    for (std::size_t v = 0; v < Count; ++v) store(load(target + v * lanes) + sums[v], target + v * lanes);
}

template <std::size_t Maps, std::size_t Vectors, class T, class Load>
inline void weighted_tile(const Block<T>& block, const Panel& panel, std::size_t first_vector, Turn turn,
                          Coefficients coefficients, Load load_vector, float* scratch) {
    std::size_t starts[Vectors];
    for (std::size_t v = 0; v < Vectors; ++v) starts[v] = panel.start(first_vector + v);
    Vector sums[Maps][Vectors];
    for (std::size_t m = 0; m < Maps; ++m) {
        for (std::size_t v = 0; v < Vectors; ++v) sums[m][v] = Vector{};
    }
    std::size_t next_fetch = turn.index;
    for (std::size_t r = 0; r < block.rows; ++r) {
        const T* row = block.first + r * block.stride;
        if (r == next_fetch) {
            next_fetch += turn.count;
            prefetch_all(row, starts, block.prefetch_ahead);
        }
        Vector values[Vectors];
        for (std::size_t v = 0; v < Vectors; ++v) values[v] = load_vector(row + starts[v]);
        for (std::size_t m = 0; m < Maps; ++m) {
            const Vector coefficient = broadcast(coefficients.first[m * coefficients.stride + r]);
            for (std::size_t v = 0; v < Vectors; ++v) sums[m][v] = multiply_add(values[v], coefficient, sums[m][v]);
        }
    }
    for (std::size_t m = 0; m < Maps; ++m) add_to(sums[m], scratch + (m * panel.vectors + first_vector) * lanes);
}

// Calls body with `value`, 1..Most, as a constant.
template <std::size_t Most, class Body>
inline void call_with(std::size_t value, const Body& body) {
    if constexpr (Most > 1) {
        if (value < Most) return call_with<Most - 1>(value, body);
    }
    body(Constant<Most>{});
}

// Calls tile(number of vectors as a constant, first vector) for tiles of about equal width: one narrow tile at the end
// would wait for the latency of its few sums.
template <class Tile>
inline void for_each_tile(std::size_t vectors, const Tile& tile) {
    const std::size_t tiles = (vectors + tile_vectors - 1) / tile_vectors;
    for (std::size_t t = 0; t < tiles; ++t) {
        const std::size_t first = vectors * t / tiles;
        call_with<tile_vectors>(vectors * (t + 1) / tiles - first, [&](auto count) { tile(count, first); });
    }
}

// A few rows of one map at a time, in order: memory is read fastest this way if nothing is used twice.
// term(row, start, total) adds the row's vector that starts there to the total; it has to hold its captures by value,
// or the compiler reloads them for each vector, because they might have been overwritten.
template <std::size_t Rows, class Term>
inline void add_rows(const Panel& panel, const Term& term, float* sums) {
    const auto add = [&](std::size_t start, float* target) {
        Vector total{};
#pragma GCC unroll 8
        for (std::size_t r = 0; r < Rows; ++r) total = term(r, start, total);
        store(load(target) + total, target);
    };
    const std::size_t last = panel.vectors - 1;
    for (std::size_t column = 0; column < last * lanes; column += lanes) add(column, sums + column);
    add(panel.start(last), sums + last * lanes);
}

// add(number of rows as a constant, first row) for all rows.
template <class Add>
inline void for_each_few(std::size_t rows, const Add& add) {
    constexpr std::size_t few = 4;
    std::size_t r = 0;
    for (; r + few <= rows; r += few) add(Constant<few>{}, r);
    for (; r < rows; ++r) add(Constant<1>{}, r);
}

template <class T>
void weighted_map(const Block<T>& block, const Panel& panel, const float* coefficients, float* sums) {
    for_each_few(block.rows, [&](auto few, std::size_t first) {
        const std::size_t stride = block.stride;
        const T* const rows = block.first + first * stride;
        Vector factors[few.value];
        for (std::size_t r = 0; r < few.value; ++r) factors[r] = broadcast(coefficients[first + r]);
        add_rows<few.value>(
            panel,
            [=](std::size_t r, std::size_t start, Vector total) {
                return multiply_add(load(rows + r * stride + start), factors[r], total);
            },
            sums);
    });
}

// One tile of columns for all maps in turn, while the tile is in the L1 cache.
template <std::size_t Vectors, class T, class Load>
void weighted_columns(const Block<T>& block, const Panel& panel, std::size_t first_vector, std::size_t maps,
                      Coefficients coefficients, Load load_vector, float* scratch) {
    Turn turn{block.prefetch_ahead == 0 ? block.rows : 0, (maps + tile_maps - 1) / tile_maps};
    for (std::size_t map = 0; map < maps; map += tile_maps, ++turn.index) {
        call_with<tile_maps>(least(tile_maps, maps - map), [&](auto count) {
            weighted_tile<count.value, Vectors>(
                block, panel, first_vector, turn,
                {coefficients.first + map * coefficients.stride, coefficients.stride}, load_vector,
                scratch + map * panel.vectors * lanes);
        });
    }
}

template <class T>
void weighted_maps(const Block<T>& block, const Panel& panel, std::size_t maps, Coefficients coefficients,
                   float* scratch) {
    if (panel.columns.count < lanes) {
        weighted_columns<1>(block, panel, 0, maps, coefficients, LoadFew{panel.columns.count}, scratch);
        return;
    }
    if (maps == 1) {
        weighted_map(block, panel, coefficients.first, scratch);
        return;
    }
    for_each_tile(panel.vectors, [&](auto vectors, std::size_t first) {
        weighted_columns<vectors.value>(block, panel, first, maps, coefficients, LoadWhole{}, scratch);
    });
}

// The same block as dense floats.
Block<float> converted(const Block<Half>& block, const Panel& panel, float* target) {
    const std::size_t width = panel.width();
    for (std::size_t r = 0; r < block.rows; ++r) {
        const Half* row = block.first + r * block.stride;
        float* const floats = target + r * width;
        for (std::size_t v = 0; v < panel.vectors; ++v) {
            const Half* source = row + panel.start(v);
            prefetch(source, block.prefetch_ahead);
            if (width < lanes) {
                for (std::size_t i = 0; i < width; ++i) floats[i] = to_float(source[i]);
            } else {
                store(load(source), floats + panel.start(v));
            }
        }
    }
    return {target, block.rows, width, 0};
}

void weighted_maps_of_block(const Block<float>& block, const Panel& panel, std::size_t maps, Coefficients coefficients,
                            float* scratch, float*) {
    weighted_maps(block, panel, maps, coefficients, scratch);
}

void weighted_maps_of_block(const Block<Half>& block, const Panel& panel, std::size_t maps, Coefficients coefficients,
                            float* scratch, float* block_scratch) {
    if (maps > tile_maps) {
        weighted_maps(converted(block, panel, block_scratch), panel, maps, coefficients, scratch);
    } else {
        weighted_maps(block, panel, maps, coefficients, scratch);
    }
}

template <class T>
void weighted_row_sum(const void* rows, std::size_t row_count, std::size_t column_count, const float* coefficients,
                      std::size_t coefficients_stride, std::size_t maps, float* scratch, float* sums,
                      std::size_t sums_stride) {
    float* const block_scratch = scratch;
    float* const map_scratch = scratch + block_floats;
    for_each_panel(Columns{column_count}, [&](const Panel& panel) {
        __builtin_memset(map_scratch, 0, maps * panel.vectors * lanes * sizeof(float));
        const T* const origin = static_cast<const T*>(rows) + panel.origin();
        const std::size_t step = panel.rows_per_block(row_count);
        for (std::size_t row = 0; row < row_count; row += step) {
            const Block<T> block{origin + row * column_count, least(step, row_count - row), column_count,
                                 step * column_count};
            weighted_maps_of_block(block, panel, maps, {coefficients + row, coefficients_stride}, map_scratch,
                                   block_scratch);
        }
        for (std::size_t map = 0; map < maps; ++map) {
            panel.unpack(map_scratch + map * panel.vectors * lanes, sums + map * sums_stride);
        }
    });
}

template <class T, class U, class Load>
void element_map(const Block<T>& block, const U* weights, const Panel& panel, Load load_vector, float* sums) {
    for_each_few(block.rows, [&](auto few, std::size_t first) {
        const std::size_t stride = block.stride;
        const T* const rows = block.first + first * stride;
        const U* const row_weights = weights + first * stride;
        add_rows<few.value>(
            panel,
            [=](std::size_t r, std::size_t start, Vector total) {
                const std::size_t at = r * stride + start;
                return multiply_add(load_vector(rows + at), load_vector(row_weights + at), total);
            },
            sums);
    });
}

template <class T, class U>
void element_block(const Block<T>& block, const U* weights, const Panel& panel, float* sums) {
    if (panel.columns.count < lanes) {
        element_map(block, weights, panel, LoadFew{panel.columns.count}, sums);
    } else {
        element_map(block, weights, panel, LoadWhole{}, sums);
    }
}

template <class T, class U>
void element_row_sum(const void* rows, const void* weights, std::size_t row_count, std::size_t column_count,
                     std::size_t weights_map_stride, std::size_t maps, float* scratch, float* sums,
                     std::size_t sums_stride) {
    for_each_panel(Columns{column_count}, [&](const Panel& panel) {
        __builtin_memset(scratch, 0, maps * panel.vectors * lanes * sizeof(float));
        const std::size_t step = panel.rows_per_block(row_count);
        for (std::size_t row = 0; row < row_count; row += step) {
            const std::size_t offset = row * column_count + panel.origin();
            const Block<T> block{static_cast<const T*>(rows) + offset, least(step, row_count - row), column_count,
                                 step * column_count};
            for (std::size_t map = 0; map < maps; ++map) {
                element_block(block, static_cast<const U*>(weights) + map * weights_map_stride + offset, panel,
                              scratch + map * panel.vectors * lanes);
            }
        }
        for (std::size_t map = 0; map < maps; ++map) {
            panel.unpack(scratch + map * panel.vectors * lanes, sums + map * sums_stride);
        }
    });
}

// Weights of the channels-last sums; one row for all when `Shared`, else one per row.
template <class U, bool Shared>
struct DotWeights {
    const U* first;
    std::size_t row_stride;
    std::size_t map_stride;

    const U* row(std::size_t map, std::size_t r) const {
        return first + map * map_stride + (Shared ? 0 : r * row_stride);
    }
    DotWeights from(std::size_t map, std::size_t r) const { return {row(map, r), row_stride, map_stride}; }
};

template <std::size_t Maps, std::size_t Rows, class T, class U, bool Shared>
void dot_tile(const T* rows, std::size_t columns, std::size_t prefetch_ahead, const DotWeights<U, Shared>& weights,
              float* sums, std::size_t sums_stride) {
    Vector totals[Maps][Rows];
    for (std::size_t m = 0; m < Maps; ++m) {
        for (std::size_t r = 0; r < Rows; ++r) totals[m][r] = Vector{};
    }
    const auto add = [&](const auto& load_from, std::size_t column) {
        Vector values[Rows];
        for (std::size_t r = 0; r < Rows; ++r) {
            if (prefetch_ahead) prefetch(rows + r * columns + column, prefetch_ahead);
            values[r] = load_from(rows + r * columns, column);
        }
        for (std::size_t m = 0; m < Maps; ++m) {
            for (std::size_t r = 0; r < Rows; ++r) {
                totals[m][r] = multiply_add(values[r], load_from(weights.row(m, r), column), totals[m][r]);
            }
        }
    };
    for (std::size_t column = 0; column + lanes <= columns; column += lanes) {
        add([](const auto* row, std::size_t at) { return load(row + at); }, column);
    }
    if (columns % lanes) {
        add([columns](const auto* row, std::size_t) { return load_rest(row, columns); }, 0);
    }
    for (std::size_t m = 0; m < Maps; ++m) {
        for (std::size_t r = 0; r < Rows; ++r) sums[m * sums_stride + r] = sum(totals[m][r]);
    }
}

template <class T, class U, bool Shared>
void row_dots_of(const T* rows, std::size_t row_count, std::size_t columns, const DotWeights<U, Shared>& weights,
                 std::size_t maps, float* sums, std::size_t sums_stride) {
    using Run = void (*)(const T*, std::size_t, std::size_t, const DotWeights<U, Shared>&, float*, std::size_t);
    constexpr Run many[] = {dot_tile<1, tile_rows, T, U, Shared>, dot_tile<2, tile_rows, T, U, Shared>,
                            dot_tile<3, tile_rows, T, U, Shared>, dot_tile<4, tile_rows, T, U, Shared>};
    constexpr Run one[] = {dot_tile<1, 1, T, U, Shared>, dot_tile<2, 1, T, U, Shared>, dot_tile<3, 1, T, U, Shared>,
                           dot_tile<4, 1, T, U, Shared>};
    static_assert(sizeof many / sizeof many[0] == tile_maps, "one function per number of maps");
    for (std::size_t row = 0; row < row_count;) {
        const std::size_t height = row + tile_rows <= row_count ? tile_rows : 1;
        for (std::size_t map = 0; map < maps; map += tile_maps) {
            const Run run = (height == 1 ? one : many)[least(tile_maps, maps - map) - 1];
            run(rows + row * columns, columns, map == 0 ? dot_prefetch_bytes / sizeof(T) : 0, weights.from(map, row),
                sums + map * sums_stride + row, sums_stride);
        }
        row += height;
    }
}

template <class T, class U>
void row_dots(const void* rows, std::size_t row_count, std::size_t columns, const void* weights,
              std::size_t weights_row_stride, std::size_t weights_map_stride, std::size_t maps, float* sums,
              std::size_t sums_stride) {
    const auto* typed_rows = static_cast<const T*>(rows);
    const auto* typed_weights = static_cast<const U*>(weights);
    if (weights_row_stride == 0) {
        row_dots_of(typed_rows, row_count, columns, DotWeights<U, true>{typed_weights, 0, weights_map_stride}, maps,
                    sums, sums_stride);
    } else {
        row_dots_of(typed_rows, row_count, columns,
                    DotWeights<U, false>{typed_weights, weights_row_stride, weights_map_stride}, maps, sums,
                    sums_stride);
    }
}

template <class T>
void row_means(const void* untyped_rows, std::size_t row_count, std::size_t columns, float* means) {
    const auto* rows = static_cast<const T*>(untyped_rows);
    for (std::size_t r = 0; r < row_count; ++r) {
        const T* row = rows + r * columns;
        Vector totals[4] = {};
        std::size_t column = 0;
        for (; column + 4 * lanes <= columns; column += 4 * lanes) {
            for (std::size_t v = 0; v < 4; ++v) totals[v] += load(row + column + v * lanes);
        }
        for (; column + lanes <= columns; column += lanes) totals[0] += load(row + column);
        if (columns % lanes) totals[1] += load_rest(row, columns);
        means[r] = sum((totals[0] + totals[1]) + (totals[2] + totals[3])) / static_cast<float>(columns);
    }
}

void half_to_float(const std::uint16_t* source, std::size_t count, float* target) {
    const auto* halves = reinterpret_cast<const Half*>(source);
    std::size_t i = 0;
    for (; i + lanes <= count; i += lanes) store(load(halves + i), target + i);
    for (; i < count; ++i) target[i] = to_float(halves[i]);
}

void add(const float* source, std::size_t count, float* target) {
    for (std::size_t i = 0; i < count; ++i) target[i] += source[i];
}

bool within(const float* values, std::size_t count, float limit) {
    Ints good = Ints{} == 0;
    std::size_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        const Vector value = load(values + i);
        good &= (value <= broadcast(limit)) & (value >= broadcast(-limit));  // false for NaN
    }
    bool all = true;
    for (std::size_t lane = 0; lane < lanes; ++lane) all &= good[lane] != 0;
    for (; i < count; ++i) all &= __builtin_fabsf(values[i]) <= limit;
    return all;
}

struct Range {
    float low;
    float high;
};

Range relu(float* map, std::size_t count) {
    float low = map[0] > 0 ? map[0] : 0;
    float high = low;
    std::size_t i = 0;
    if (count >= lanes) {
        Vector lows = broadcast(low);
        Vector highs = lows;
        for (; i + lanes <= count; i += lanes) {
            const Vector value = larger(load(map + i), Vector{});
            store(value, map + i);
            lows = smaller(lows, value);
            highs = larger(highs, value);
        }
        for (std::size_t lane = 0; lane < lanes; ++lane) {
            low = least(low, lows[lane]);
            high = high > highs[lane] ? high : highs[lane];
        }
    }
    for (; i < count; ++i) {
        map[i] = map[i] > 0 ? map[i] : 0;
        low = least(low, map[i]);
        high = high > map[i] ? high : map[i];
    }
    return {low, high};
}

// The share of positive values in the sum of all magnitudes.
float positive_share(const float* map, std::size_t count) {
    Vector positives{};
    Vector negatives{};
    std::size_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        const Vector value = load(map + i);
        positives += larger(value, Vector{});
        negatives += smaller(value, Vector{});
    }
    double positive = sum(positives);
    double negative = sum(negatives);
    for (std::size_t rest = i; rest < count; ++rest) (map[rest] > 0 ? positive : negative) += map[rest];
    constexpr double largest = 3.402823466e38;
    if (!(positive <= largest && negative >= -largest)) {
        // The sum of a lane exceeded float32's range.
        positive = negative = 0;
        for (std::size_t value = 0; value < count; ++value) (map[value] > 0 ? positive : negative) += map[value];
    }
    const double all = positive - negative;
    return all > 0 ? static_cast<float>(positive / all) : 0.0f;
}

bool finish(float* map, std::size_t count, Normalization normalization, float* evidence) {
    if (!within(map, count, 3.402823466e38f)) return false;
    *evidence = positive_share(map, count);
    const Range range = relu(map, count);
    if (normalization == Normalization::none) return true;
    const float low = normalization == Normalization::minmax ? range.low : 0.0f;
    const float span = range.high - low;
    if (span == 0) {
        for (std::size_t i = 0; i < count; ++i) map[i] = 0;
    } else {
        // Not times 1 / span, which overflows for a subnormal span.
        for (std::size_t i = 0; i < count; ++i) map[i] = (map[i] - low) / span;
    }
    return true;
}

void interpolate_columns(const float* row, const std::uint32_t* left, const std::uint32_t* right,
                         const float* fraction, std::size_t width, float* target) {
    for (std::size_t x = 0; x < width; ++x) {
        const float value = row[left[x]];
        target[x] = value + fraction[x] * (row[right[x]] - value);
    }
}

void interpolate_rows(const float* __restrict top, const float* __restrict bottom, float fraction, std::size_t width,
                      float* __restrict target) {
    for (std::size_t x = 0; x < width; ++x) target[x] = top[x] + fraction * (bottom[x] - top[x]);
}

// Adding and subtracting 1.5 * 2^23 (2^52) rounds to the nearest integer, ties to even, as numpy.rint does.
constexpr float round_float = 0x1.8p23f;
constexpr double round_double = 0x1.8p52;

// The palette index of each value.
void palette_indices(const float* values, std::size_t width, std::int32_t* indices) {
    const auto index_of = [](auto value, auto zero, auto one) {
        const auto positive = value > zero ? value : zero;  // zero for NaN
        const auto clipped = positive < one ? positive : one;
        return (255 * clipped + round_float) - round_float;
    };
    std::size_t x = 0;
    for (; x + lanes <= width; x += lanes) {
        const Ints index = __builtin_convertvector(index_of(load(values + x), Vector{}, broadcast(1)), Ints);
        __builtin_memcpy(indices + x, &index, sizeof index);
    }
    for (; x < width; ++x) indices[x] = static_cast<std::int32_t>(index_of(values[x], 0.0f, 1.0f));
}

void blend_row(const float* values, const std::uint8_t* pixels, std::size_t width, const Tint* tints, double rest,
               std::int32_t* scratch, std::uint8_t* overlay) {
    if (width == 0) return;
    palette_indices(values, width, scratch);
    const std::size_t last = width - 1;
    // In double, as the specification: in float32 some values would be rounded differently.
    for (std::size_t x = 0; x < last; ++x) {
        ExactPixel tint;
        __builtin_memcpy(&tint, tints[scratch[x]].components, sizeof tint);
        const ExactPixel blended = rest * __builtin_convertvector(load_pixel(pixels + 3 * x), ExactPixel) + tint;
        store_pixel(__builtin_convertvector((blended + round_double) - round_double, Pixel), overlay + 3 * x);
    }
    // The byte past the last pixel belongs to the next row, or is unused.
    for (std::size_t c = 0; c < 3; ++c) {
        const double blended = rest * pixels[3 * last + c] + tints[scratch[last]].components[c];
        overlay[3 * last + c] =
            static_cast<std::uint8_t>(static_cast<std::int32_t>((blended + round_double) - round_double));
    }
}

// Rounded weights may sum to slightly more than one, hence the limit of 255.
constexpr std::int32_t filter_half = std::int32_t{1} << (filter_bits - 1);

void filter_columns(const std::uint8_t* row, const std::uint32_t* first, const std::int32_t* coefficients,
                    std::size_t taps, std::size_t width, std::uint8_t* target) {
    for (std::size_t x = 0; x < width; ++x) {
        const std::uint8_t* const source = row + 3 * std::size_t{first[x]};
        Pixel total = Pixel{} + filter_half;
        for (std::size_t t = 0; t < taps; ++t) total += coefficients[x * taps + t] * load_pixel(source + 3 * t);
        total >>= filter_bits;
        store_pixel(total < 255 ? total : Pixel{} + 255, target + 3 * x);
    }
}

void filter_rows(const std::uint8_t* const* rows, const std::int32_t* coefficients, std::size_t taps,
                 std::size_t count, std::uint8_t* target) {
    std::size_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        Ints total = Ints{} + filter_half;
        for (std::size_t t = 0; t < taps; ++t) total += coefficients[t] * load_bytes(rows[t] + i);
        total >>= filter_bits;
        store_bytes(total < 255 ? total : Ints{} + 255, target + i);
    }
    for (; i < count; ++i) {
        std::int32_t total = filter_half;
        for (std::size_t t = 0; t < taps; ++t) total += coefficients[t] * rows[t][i];
        target[i] = static_cast<std::uint8_t>(least(total >> filter_bits, 255));
    }
}

}  // namespace

extern const ConvolutionKernels FASTCAM_CONVOLUTION_KERNELS;
extern const DenseKernels FASTCAM_DENSE_KERNELS;
extern const SimdKernels FASTCAM_KERNELS;
const SimdKernels FASTCAM_KERNELS = {
#if defined(__AVX512F__)
    "avx512",
#elif defined(__AVX2__)
    "avx2",
#else
    "baseline",
#endif
    {weighted_row_sum<float>, weighted_row_sum<Half>},
    {{element_row_sum<float, float>, element_row_sum<float, Half>},
     {element_row_sum<Half, float>, element_row_sum<Half, Half>}},
    {{row_dots<float, float>, row_dots<float, Half>}, {row_dots<Half, float>, row_dots<Half, Half>}},
    {row_means<float>, row_means<Half>},
    half_to_float,
    add,
    finish,
    within,
    interpolate_columns,
    interpolate_rows,
    blend_row,
    filter_columns,
    filter_rows,
    &FASTCAM_CONVOLUTION_KERNELS,
    &FASTCAM_DENSE_KERNELS,
};

}  // namespace fastcam
