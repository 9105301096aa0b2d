// The loops of the convolutions, as a table of functions per instruction set. No bounds are checked here.
#pragma once

#include <cstddef>

namespace fastcam {

// A row of a panel is this many vectors wide, except in the last panel, which may be one vector wide.
constexpr std::size_t panel_vectors = 2;

// Applied to each result of a convolution: clip(scale * sum + bias + residual, low, high).
struct Finish {
    const float* bias;  // a whole number of vectors
    float scale;        // a power of two; for matrix products: 1
    float low;
    float high;
};

// rows x (vectors * lanes) results of a matrix product: left (rows, depth) times panel (depth, vectors * lanes).
struct Product {
    const float* left;
    std::size_t left_stride;  // from row to row, or from depth to depth for left matrices with contiguous columns
    const float* panel;
    std::size_t depth;
    std::size_t vectors;  // 1 or 2
    std::size_t rows;
    float* result;
    std::size_t result_stride;  // from row to row
};

// Destination of the results of a product: `columns` of them per row, at most vectors * lanes.
struct Target {
    const float* residual;  // as `result` of the product, same stride; or null
    std::size_t columns;
};

// Input of one tile of Winograd's algorithm: (T, T) pixels, the first at (row, column), which may be outside the
// image, where zeros are read.
struct TileInput {
    const float* image;  // (height, width, channels)
    std::size_t height;
    std::size_t width;
    std::size_t channels;
    std::ptrdiff_t row;
    std::ptrdiff_t column;
    const float* zeros;  // as many as there are channels
    float scale;         // a power of two
    float* transformed;  // of each position: channels, rounded up to whole vectors
    std::size_t position_stride;
};

// Output of one tile, `channels` of its channels: (rows, columns) results.
struct TileOutput {
    const float* products;
    std::size_t position_stride;
    std::size_t channels;
    std::size_t rows;     // of the tile that are inside the image, before pooling
    std::size_t columns;
    float* result;        // the tile's first pixel
    const float* residual;  // same strides; or null
    std::size_t row_stride;
    std::size_t column_stride;
    bool pool;
};

// How a tile of Winograd's algorithm is transformed. Results: (m, m), positions: (m + 2, m + 2).
struct TileTransforms {
    void (*input)(const TileInput& tile);
    // Whether every result, before the clip, is finite.
    bool (*output)(const TileOutput& tile, const Finish& finish);
};

struct ConvolutionKernels {
    std::size_t lanes;
    std::size_t most_rows;  // rows that a product computes at a time; multiples of it are the fastest

    void (*multiply)(const Product& product);
    void (*multiply_finished)(const Product& product, const Target& target, const Finish& finish);
    // With a left matrix whose columns are contiguous.
    void (*multiply_columns_finished)(const Product& product, const Target& target, const Finish& finish);

    TileTransforms winograd_4x4;
    TileTransforms winograd_6x6;
};

}  // namespace fastcam
