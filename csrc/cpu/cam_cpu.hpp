// Grad-CAM on the CPU: activations and weights in, maps, heatmaps and overlays out. No Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "simd_kernels.hpp"
#include "size.hpp"

namespace fastcam {

enum class ChannelOrder { channels_first, channels_last };
enum class Weighting { channel, pooled, element };

// Images of one array, each dense, `image_stride` elements apart.
struct Batch {
    const void* data;
    std::ptrdiff_t image_stride;
    Scalar scalar;
};

// From activations (images, channels, size) and weights to maps (images, maps, size).
struct MapJob {
    Batch activations;  // in `channel_order`
    Batch weights;      // channel: (maps, channels); otherwise (maps, channels, size) laid out as the activations
    ChannelOrder channel_order;
    Weighting weighting;
    Normalization normalization;
    std::size_t channels;
    float* maps;
    float* evidence;  // (images, maps): share of the positive values in the sum of magnitudes before the ReLU
};

// From maps (images, maps, size) to heatmaps (images, maps, size) and overlays (images, maps, size, 3).
struct ViewJob {
    const float* maps;
    Size map_size;
    Size size;
    float* heatmaps;             // or null
    const std::uint8_t* pixels;  // (images, size, 3), or null: no overlay
    std::ptrdiff_t pixels_stride;
    const std::uint8_t* palette;  // (256, 3)
    double alpha;                 // weight of the palette's colour, 0..1
    std::uint8_t* overlays;
};

struct Count {
    std::size_t images;
    std::size_t maps;
};

// Both return the first map (image * maps + map) that holds NaN, infinity or, in `view`, a value beyond `view_limit`;
// the outputs are then incomplete. The result does not depend on `threads`.
std::optional<std::size_t> render(Count count, const MapJob& map_job, const ViewJob& view_job, std::size_t threads);
std::optional<std::size_t> view(Count count, const ViewJob& job, std::size_t threads);

// The first of the rows, `columns` floats each, that holds NaN or infinity.
std::optional<std::size_t> first_not_finite(const float* values, std::size_t rows, std::size_t columns);

// Half of the largest float32: the difference of two such values is finite.
constexpr float view_limit = 0x1.fffffep126f;

}  // namespace fastcam
