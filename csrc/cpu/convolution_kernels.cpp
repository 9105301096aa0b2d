// Compiled once per instruction set; FASTCAM_CONVOLUTION_KERNELS names the table that this compilation defines.
#include "convolution_kernels.hpp"

#include "simd.hpp"

namespace fastcam {
namespace {

#if defined(__AVX512F__)
constexpr std::size_t most_rows = 14;  // 28 sums + 2 vectors of the panel + 1 coefficient of the 32 registers
#elif defined(__AVX2__)
constexpr std::size_t most_rows = 6;  // 12 + 2 + 1 of 16
#else
constexpr std::size_t most_rows = 12;  // 24 + 2 + 1 of 32
#endif

// How far ahead of a product its panel is prefetched into the L1 cache and into the L2 cache. The panels of layers
// with many channels come from main memory.
constexpr std::size_t near_floats = 32 * lanes;
constexpr std::size_t far_floats = 384 * lanes;

// The sums of one row and of the rows before it. Nested, not an array: GCC keeps arrays of vectors in memory.
template <std::size_t Rows, std::size_t Vectors>
struct Sums {
    Sums<Rows - 1, Vectors> before{};
    Vector first{};
    Vector second{};
};

template <std::size_t Vectors>
struct Sums<0, Vectors> {};

// The left matrix, row by row. Addresses are a few bases plus small multiples of the stride: there are not enough
// registers for a pointer per row.
struct RowMajor {
    static constexpr bool rows_are_contiguous = true;
    static constexpr std::size_t rows_per_base = 5;

    const float* first;
    const float* second;
    const float* third;
    std::size_t stride;
    std::size_t stride3;
    const float* next;  // the following rows, which are prefetched meanwhile

    RowMajor(const float* left, std::size_t left_stride, std::size_t rows)
        : first(left),
          second(left + rows_per_base * left_stride),
          third(left + 2 * rows_per_base * left_stride),
          stride(left_stride),
          stride3(3 * left_stride),
          next(left + rows * left_stride) {}

    template <std::size_t Row>
    float at() const {
        const float* base = Row / rows_per_base == 0 ? first : Row / rows_per_base == 1 ? second : third;
        constexpr std::size_t rest = Row % rows_per_base;
        return *(rest == 3 ? base + stride3 : base + rest * stride);
    }

    void advance(std::size_t rows) {
        ++first;
        ++second;
        ++third;
        prefetch_far(next, 0);
        next += rows;
    }
};

// The left matrix, column by column.
struct ColumnMajor {
    static constexpr bool rows_are_contiguous = false;

    const float* column;
    std::size_t stride;

    ColumnMajor(const float* left, std::size_t left_stride, std::size_t) : column(left), stride(left_stride) {}

    template <std::size_t Row>
    float at() const {
        return column[Row];
    }

    void advance(std::size_t) { column += stride; }
};

template <std::size_t Rows, std::size_t Vectors, class Left>
[[gnu::always_inline]] inline void accumulate(Sums<Rows, Vectors>& sums, const Left& left, Vector first, Vector second) {
    if constexpr (Rows > 0) {
        accumulate(sums.before, left, first, second);
        const Vector coefficient = broadcast(left.template at<Rows - 1>());
        sums.first = multiply_add(coefficient, first, sums.first);
        if constexpr (Vectors == 2) sums.second = multiply_add(coefficient, second, sums.second);
    }
}

// How sums are stored.
struct Store {
    float* result;
    std::size_t stride;

    template <std::size_t Vectors>
    void row(std::size_t index, Vector first, Vector second) const {
        store(first, result + index * stride);
        if constexpr (Vectors == 2) store(second, result + index * stride + lanes);
    }
};

inline Vector clip(Vector value, Vector low, Vector high) {
    // With this order of operands NaN passes through.
    value = low > value ? low : value;
    return high < value ? high : value;
}

inline Vector load_up_to(const float* source, std::size_t count) {
    return count >= lanes ? load(source) : load_few(source, count);
}

inline void store_up_to(Vector vector, float* target, std::size_t count) {
    if (count >= lanes) {
        store(vector, target);
    } else {
        store_few(vector, target, count);
    }
}

struct StoreFinished {
    float* result;
    std::size_t stride;
    Target target;
    Finish finish;

    template <std::size_t Vectors>
    [[gnu::always_inline]] void row(std::size_t index, Vector first, Vector second) const {
        part(index * stride, 0, first);
        if constexpr (Vectors == 2) part(index * stride, lanes, second);
    }

private:
    [[gnu::always_inline]] void part(std::size_t row, std::size_t column, Vector sum) const {
        const std::size_t count = target.columns - column;
        Vector value = sum + load(finish.bias + column);
        if (target.residual) value += load_up_to(target.residual + row + column, count);
        store_up_to(clip(value, broadcast(finish.low), broadcast(finish.high)), result + row + column, count);
    }
};

template <std::size_t Rows, std::size_t Vectors, class Output>
[[gnu::always_inline]] inline void put(const Sums<Rows, Vectors>& sums, const Output& output, std::size_t row) {
    if constexpr (Rows > 0) {
        put(sums.before, output, row);
        output.template row<Vectors>(row + Rows - 1, sums.first, sums.second);
    }
}

template <std::size_t Vectors>
inline void prefetch_panel(const float* panel) {
    constexpr std::size_t line = 16;
    for (std::size_t first = 0; first < Vectors * lanes; first += line) {
        prefetch_near(panel, near_floats + first);
        prefetch_far(panel, far_floats + first);
    }
}

template <std::size_t Rows, std::size_t Vectors, class Left, class Output>
void multiply_rows(const float* first, std::size_t stride, const float* panel, std::size_t depth, const Output& output,
                   std::size_t row) {
    Sums<Rows, Vectors> sums;
    Left left(first, stride, Rows);
    for (std::size_t k = 0; k < depth; ++k) {
        const Vector a = load(panel);
        const Vector b = Vectors == 2 ? load(panel + lanes) : Vector{};
        prefetch_panel<Vectors>(panel);
        panel += Vectors * lanes;
        accumulate(sums, left, a, b);
        left.advance(Rows);
    }
    put(sums, output, row);
}

template <std::size_t Vectors, class Left, class Output, std::size_t Rows = most_rows>
inline void multiply_some(std::size_t rows, const float* first, std::size_t stride, const float* panel,
                          std::size_t depth, const Output& output, std::size_t row) {
    if constexpr (Rows > 0) {
        if (rows == Rows) {
            multiply_rows<Rows, Vectors, Left>(first, stride, panel, depth, output, row);
        } else {
            multiply_some<Vectors, Left, Output, Rows - 1>(rows, first, stride, panel, depth, output, row);
        }
    }
}

// Blocks of about equal height: a last block of one row would stall the multipliers.
template <std::size_t Vectors, class Left, class Output>
inline void multiply_blocks(const Product& product, const Output& output) {
    const std::size_t row_step = Left::rows_are_contiguous ? product.left_stride : 1;
    const std::size_t blocks = (product.rows + most_rows - 1) / most_rows;
    for (std::size_t block = 0; block < blocks; ++block) {
        const std::size_t row = block * product.rows / blocks;
        const std::size_t end = (block + 1) * product.rows / blocks;
        multiply_some<Vectors, Left>(end - row, product.left + row * row_step, product.left_stride, product.panel,
                                     product.depth, output, row);
    }
}

template <class Left, class Output>
inline void multiply_any(const Product& product, const Output& output) {
    if (product.vectors == 2) {
        multiply_blocks<2, Left>(product, output);
    } else {
        multiply_blocks<1, Left>(product, output);
    }
}

void multiply(const Product& product) { multiply_any<RowMajor>(product, Store{product.result, product.result_stride}); }

template <class Left>
void multiply_finished(const Product& product, const Target& target, const Finish& finish) {
    multiply_any<Left>(product, StoreFinished{product.result, product.result_stride, target, finish});
}

inline Vector times(float a, Vector b) { return broadcast(a) * b; }
inline Vector times_plus(float a, Vector b, Vector c) { return multiply_add(broadcast(a), b, c); }

// Winograd's transforms in one dimension, with interpolation points 0, 1, -1, 2, -2, infinity.
struct Winograd4 {
    static constexpr std::size_t results = 4;

    static void input(const Vector (&d)[6], Vector (&t)[6]) {
        const Vector even = times_plus(-4, d[2], d[4]);
        const Vector odd = times_plus(-4, d[1], d[3]);
        const Vector even2 = d[4] - d[2];
        const Vector odd2 = times(2, d[3] - d[1]);
        t[0] = times_plus(4, d[0], times_plus(-5, d[2], d[4]));
        t[1] = even + odd;
        t[2] = even - odd;
        t[3] = even2 + odd2;
        t[4] = even2 - odd2;
        t[5] = times_plus(4, d[1], times_plus(-5, d[3], d[5]));
    }

    static void output(const Vector (&m)[6], Vector (&r)[4]) {
        const Vector even = m[1] + m[2];
        const Vector odd = m[1] - m[2];
        const Vector even2 = m[3] + m[4];
        const Vector odd2 = m[3] - m[4];
        r[0] = m[0] + even + even2;
        r[1] = times_plus(2, odd2, odd);
        r[2] = times_plus(4, even2, even);
        r[3] = times_plus(8, odd2, odd) + m[5];
    }
};

// Points 0, 1, -1, 2, -2, 1/2, -1/2, infinity.
struct Winograd6 {
    static constexpr std::size_t results = 6;

    static void input(const Vector (&d)[8], Vector (&t)[8]) {
        const Vector even = times_plus(-4.25f, d[4], d[2] + d[6]);
        const Vector odd = times_plus(-4.25f, d[3], d[1] + d[5]);
        const Vector even2 = times_plus(0.25f, d[2], times_plus(-1.25f, d[4], d[6]));
        const Vector odd2 = times_plus(0.5f, d[1], times_plus(-2.5f, d[3], d[5] + d[5]));
        const Vector even_half = times_plus(4, d[2], times_plus(-5, d[4], d[6]));
        const Vector odd_half = times_plus(2, d[1], times_plus(-2.5f, d[3], times(0.5f, d[5])));
        t[0] = times_plus(5.25f, d[4] - d[2], d[0] - d[6]);
        t[1] = even + odd;
        t[2] = even - odd;
        t[3] = even2 + odd2;
        t[4] = even2 - odd2;
        t[5] = even_half + odd_half;
        t[6] = even_half - odd_half;
        t[7] = times_plus(5.25f, d[3] - d[5], d[7] - d[1]);
    }

    static void output(const Vector (&m)[8], Vector (&r)[6]) {
        const Vector even = m[1] + m[2];
        const Vector odd = m[1] - m[2];
        const Vector even2 = m[3] + m[4];
        const Vector odd2 = m[3] - m[4];
        const Vector even_half = m[5] + m[6];
        const Vector odd_half = m[5] - m[6];
        r[0] = (m[0] + even) + (even2 + even_half);
        r[1] = times_plus(2, odd2, times_plus(0.5f, odd_half, odd));
        r[2] = times_plus(4, even2, times_plus(0.25f, even_half, even));
        r[3] = times_plus(8, odd2, times_plus(0.125f, odd_half, odd));
        r[4] = times_plus(16, even2, times_plus(0.0625f, even_half, even));
        r[5] = times_plus(32, odd2, times_plus(0.03125f, odd_half, odd)) + m[7];
    }
};

struct LoadInside {
    const float* first;
    std::size_t row_stride;
    std::size_t column_stride;

    Vector operator()(std::size_t row, std::size_t column) const {
        return load(first + row * row_stride + column * column_stride);
    }
};

// A pointer per pixel, to zeros for pixels outside the image.
template <std::size_t Size>
struct LoadBorder {
    const float* const (*pixels)[Size];
    std::size_t channel;

    Vector operator()(std::size_t row, std::size_t column) const { return load(pixels[row][column] + channel); }
};

// With features that a tile rarely needs: fewer channels than lanes, a scale.
template <std::size_t Size>
struct LoadScaled {
    const float* const (*pixels)[Size];
    std::size_t channel;
    std::size_t count;
    float scale;

    Vector operator()(std::size_t row, std::size_t column) const {
        return load_up_to(pixels[row][column] + channel, count) * broadcast(scale);
    }
};

template <class Winograd, class Load>
[[gnu::always_inline]] inline void transform_input_vector(const Load& load_pixel_vector, float* transformed,
                                                          std::size_t position_stride) {
    constexpr std::size_t size = Winograd::results + 2;
    Vector half_way[size][size];
    Vector line[size];
    Vector result[size];
    for (std::size_t column = 0; column < size; ++column) {
#pragma GCC unroll 8
        for (std::size_t row = 0; row < size; ++row) line[row] = load_pixel_vector(row, column);
        Winograd::input(line, result);
#pragma GCC unroll 8
        for (std::size_t row = 0; row < size; ++row) half_way[row][column] = result[row];
    }
    for (std::size_t row = 0; row < size; ++row) {
#pragma GCC unroll 8
        for (std::size_t column = 0; column < size; ++column) line[column] = half_way[row][column];
        Winograd::input(line, result);
#pragma GCC unroll 8
        for (std::size_t column = 0; column < size; ++column) {
            store(result[column], transformed + (row * size + column) * position_stride);
        }
    }
}

template <class Winograd, class MakeLoad>
inline std::size_t transform_whole_vectors(const TileInput& tile, const MakeLoad& load_from) {
    std::size_t channel = 0;
    for (; channel + lanes <= tile.channels; channel += lanes) {
        transform_input_vector<Winograd>(load_from(channel), tile.transformed + channel, tile.position_stride);
    }
    return channel;
}

template <class Winograd>
void transform_input(const TileInput& tile) {
    constexpr std::size_t size = Winograd::results + 2;
    const bool inside = tile.row >= 0 && tile.column >= 0 &&
                        static_cast<std::size_t>(tile.row) + size <= tile.height &&
                        static_cast<std::size_t>(tile.column) + size <= tile.width;
    if (inside && tile.scale == 1 && tile.channels % lanes == 0) {
        const std::size_t row_stride = tile.width * tile.channels;
        const float* first = tile.image + static_cast<std::size_t>(tile.row) * row_stride +
                             static_cast<std::size_t>(tile.column) * tile.channels;
        transform_whole_vectors<Winograd>(
            tile, [&](std::size_t channel) { return LoadInside{first + channel, row_stride, tile.channels}; });
        return;
    }
    const float* pixels[size][size];
    for (std::size_t i = 0; i < size; ++i) {
        for (std::size_t j = 0; j < size; ++j) {
            // A row or column before the first wraps to a very large number.
            const std::size_t row = static_cast<std::size_t>(tile.row + static_cast<std::ptrdiff_t>(i));
            const std::size_t column = static_cast<std::size_t>(tile.column + static_cast<std::ptrdiff_t>(j));
            const bool in_image = row < tile.height && column < tile.width;
            pixels[i][j] = in_image ? tile.image + (row * tile.width + column) * tile.channels : tile.zeros;
        }
    }
    std::size_t channel = 0;
    if (tile.scale == 1) {
        channel = transform_whole_vectors<Winograd>(
            tile, [&](std::size_t first) { return LoadBorder<size>{pixels, first}; });
    }
    for (; channel < tile.channels; channel += lanes) {
        transform_input_vector<Winograd>(LoadScaled<size>{pixels, channel, tile.channels - channel, tile.scale},
                                         tile.transformed + channel, tile.position_stride);
    }
}

// The results of one vector of channels of a tile. Whole: the vector has no lanes past the last channel.
template <class Winograd, bool Pool, bool Whole>
[[gnu::always_inline]] inline void transform_output_vector(const TileOutput& tile, const Finish& finish,
                                                           std::size_t channel, Vector& not_finite) {
    constexpr std::size_t results = Winograd::results;
    constexpr std::size_t size = results + 2;
    const std::size_t count = Whole ? lanes : tile.channels - channel;
    const auto put = [&](Vector value, float* target) {
        if constexpr (Whole) {
            store(value, target);
        } else {
            store_few(value, target, count);
        }
    };
    Vector half_way[results][size];
    const float* products = tile.products + channel;
    for (std::size_t column = 0; column < size; ++column) {
        Vector line[size];
        Vector result[results];
#pragma GCC unroll 8
        for (std::size_t row = 0; row < size; ++row) line[row] = load(products + (row * size + column) * tile.position_stride);
        Winograd::output(line, result);
#pragma GCC unroll 8
        for (std::size_t row = 0; row < results; ++row) half_way[row][column] = result[row];
    }
    const Vector bias = load(finish.bias + channel);
    const Vector scale = broadcast(finish.scale);
    const Vector low = broadcast(finish.low);
    const Vector high = broadcast(finish.high);
    const auto finished_row = [&](std::size_t row, Vector (&result)[results]) {
        Vector line[size];
#pragma GCC unroll 8
        for (std::size_t column = 0; column < size; ++column) line[column] = half_way[row][column];
        Winograd::output(line, result);
#pragma GCC unroll 8
        for (std::size_t column = 0; column < results; ++column) {
            Vector value = multiply_add(result[column], scale, bias);
            not_finite = multiply_add(value, Vector{}, not_finite);
            if (!Pool && tile.residual && row < tile.rows && column < tile.columns) {
                const float* residual = tile.residual + row * tile.row_stride + column * tile.column_stride + channel;
                value += Whole ? load(residual) : load_few(residual, count);
            }
            result[column] = clip(value, low, high);
        }
    };
    if constexpr (Pool) {
        for (std::size_t row = 0; row + 1 < results && row + 1 < tile.rows; row += 2) {
            Vector upper[results];
            Vector lower[results];
            finished_row(row, upper);
            finished_row(row + 1, lower);
#pragma GCC unroll 4
            for (std::size_t column = 0; column < results; column += 2) {
                if (column + 1 < tile.columns) {
                    const Vector most = larger(larger(upper[column], upper[column + 1]),
                                               larger(lower[column], lower[column + 1]));
                    put(most, tile.result + row / 2 * tile.row_stride + column / 2 * tile.column_stride + channel);
                }
            }
        }
    } else {
        for (std::size_t row = 0; row < results && row < tile.rows; ++row) {
            Vector result[results];
            finished_row(row, result);
#pragma GCC unroll 8
            for (std::size_t column = 0; column < results; ++column) {
                if (column < tile.columns) {
                    put(result[column], tile.result + row * tile.row_stride + column * tile.column_stride + channel);
                }
            }
        }
    }
}

template <class Winograd, bool Pool>
inline bool transform_output_channels(const TileOutput& tile, const Finish& finish) {
    Vector not_finite{};
    std::size_t channel = 0;
    for (; channel + lanes <= tile.channels; channel += lanes) {
        transform_output_vector<Winograd, Pool, true>(tile, finish, channel, not_finite);
    }
    if (channel < tile.channels) {
        transform_output_vector<Winograd, Pool, false>(tile, finish, channel, not_finite);
    }
    return sum(not_finite) == 0;
}

template <class Winograd>
bool transform_output(const TileOutput& tile, const Finish& finish) {
    return tile.pool ? transform_output_channels<Winograd, true>(tile, finish)
                     : transform_output_channels<Winograd, false>(tile, finish);
}

}  // namespace

extern const ConvolutionKernels FASTCAM_CONVOLUTION_KERNELS;
const ConvolutionKernels FASTCAM_CONVOLUTION_KERNELS = {
    lanes,
    most_rows,
    multiply,
    multiply_finished<RowMajor>,
    multiply_finished<ColumnMajor>,
    {transform_input<Winograd4>, transform_output<Winograd4>},
    {transform_input<Winograd6>, transform_output<Winograd6>},
};

}  // namespace fastcam
