// The tight loops, as a table of functions per instruction set. No bounds are checked here: cam_cpu.cpp calls them with
// sizes that were checked at the boundary.
#pragma once

#include <cstddef>
#include <cstdint>

#include "convolution_kernels.hpp"
#include "dense_kernels.hpp"

namespace fastcam {

enum class Normalization { none, max, minmax };

enum class Scalar { float32 = 0, float16 = 1 };
constexpr int scalar_count = 2;

// Maximum number of columns that are summed at a time, and of floats in a block of them. A block and the sums stay in
// the L2 cache.
constexpr std::size_t panel_columns = 384;
constexpr std::size_t block_floats = std::size_t{1} << 14;

// Floats of scratch memory for the sums over rows.
constexpr std::size_t scratch_floats(std::size_t columns, std::size_t maps) {
    constexpr std::size_t widest_vector = 16;
    const std::size_t padded = (columns + widest_vector - 1) / widest_vector * widest_vector;
    return block_floats + maps * (padded < panel_columns ? padded : panel_columns);
}

// Fractional bits of the weights for resizing a picture.
constexpr int filter_bits = 22;

// A colour times its weight in the overlay, and a spare component, so that a pixel is one vector.
struct Tint {
    double components[4];
};

// T, U stand for float32 or float16 behind `const void*`; the tables are indexed by Scalar.
struct SimdKernels {
    const char* name;

    // sums[m][j] = sum over r of coefficients[m][r] * rows[r][j].  rows: T (row_count, columns), dense.
    // scratch: scratch_floats(columns, maps).  sums: (maps, columns), `sums_stride` floats from map to map.
    using WeightedRowSum = void (*)(const void* rows, std::size_t row_count, std::size_t columns,
                                    const float* coefficients, std::size_t coefficients_stride, std::size_t maps,
                                    float* scratch, float* sums, std::size_t sums_stride);
    WeightedRowSum weighted_row_sum[scalar_count];

    // sums[m][j] = sum over r of weights[m][r][j] * rows[r][j].  rows: T, weights: U, dense except for the stride from
    // map to map (elements).  scratch, sums: as above.
    using ElementRowSum = void (*)(const void* rows, const void* weights, std::size_t row_count, std::size_t columns,
                                   std::size_t weights_map_stride, std::size_t maps, float* scratch, float* sums,
                                   std::size_t sums_stride);
    ElementRowSum element_row_sum[scalar_count][scalar_count];

    // sums[m][r] = sum over j of weights[m][r][j] * rows[r][j].  rows: T dense; weights: U, rows and maps spaced by
    // the strides (elements).
    using RowDots = void (*)(const void* rows, std::size_t row_count, std::size_t columns, const void* weights,
                             std::size_t weights_row_stride, std::size_t weights_map_stride, std::size_t maps,
                             float* sums, std::size_t sums_stride);
    RowDots row_dots[scalar_count][scalar_count];

    // means[r] = mean over j of rows[r][j].  rows: T dense.
    using RowMeans = void (*)(const void* rows, std::size_t row_count, std::size_t columns, float* means);
    RowMeans row_means[scalar_count];

    void (*half_to_float)(const std::uint16_t* source, std::size_t count, float* target);

    // target += source
    void (*add)(const float* source, std::size_t count, float* target);

    // ReLU, then normalisation, in place; *evidence = sum of the positive values / sum of the magnitudes before the
    // ReLU, 0 for a map of zeros. False, with everything unchanged, if the map holds NaN or infinity.
    bool (*finish)(float* map, std::size_t count, Normalization normalization, float* evidence);

    // Whether every |value| <= limit, and none is NaN.
    bool (*within)(const float* values, std::size_t count, float limit);

    // target[x] = row[left[x]] + fraction[x] * (row[right[x]] - row[left[x]])
    void (*interpolate_columns)(const float* row, const std::uint32_t* left, const std::uint32_t* right,
                                const float* fraction, std::size_t width, float* target);

    // target = top + fraction * (bottom - top)
    void (*interpolate_rows)(const float* top, const float* bottom, float fraction, std::size_t width, float* target);

    // One row of the overlay: rest * pixel + tint of the value.  pixels, overlay: (width, 3); tints: 256; scratch:
    // width.
    void (*blend_row)(const float* values, const std::uint8_t* pixels, std::size_t width, const Tint* tints,
                      double rest, std::int32_t* scratch, std::uint8_t* overlay);

    // One row of a picture at another width: pixel x is the sum over t of coefficients[x][t] * row[first[x] + t],
    // rounded.  row: pixels of three bytes, and a byte after the last that may be read; target: (width, 3) and a byte
    // after the last that may be written.
    void (*filter_columns)(const std::uint8_t* row, const std::uint32_t* first, const std::int32_t* coefficients,
                           std::size_t taps, std::size_t width, std::uint8_t* target);

    // target[i] = sum over t of coefficients[t] * rows[t][i], rounded.
    void (*filter_rows)(const std::uint8_t* const* rows, const std::int32_t* coefficients, std::size_t taps,
                        std::size_t count, std::uint8_t* target);

    const ConvolutionKernels* convolution;
    const DenseKernels* dense;
};

extern const SimdKernels baseline_kernels;
#if defined(FASTCAM_X86)
extern const SimdKernels avx2_kernels;
extern const SimdKernels avx512_kernels;
#endif

}  // namespace fastcam
