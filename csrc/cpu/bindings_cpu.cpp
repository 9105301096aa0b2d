// The module fastcam.kernels._cpu. Python validates with good messages; the checks repeated here keep every access
// inside the arrays even when the module is called directly.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../gil.hpp"
#include "bindings_convolution.hpp"
#include "cam_cpu.hpp"
#include "instruction_sets.hpp"
#include "pictures.hpp"
#include "thread_pool.hpp"

namespace py = pybind11;

namespace fastcam {
namespace {

using Shape = std::vector<py::ssize_t>;

[[noreturn]] void refuse(const char* name, const char* what) {
    throw std::invalid_argument(std::string(name) + ": " + what);
}

void require(bool condition, const char* name, const char* what) {
    if (!condition) refuse(name, what);
}

bool is_aligned(const py::array& array) {
    return (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
}

bool is_dense(const py::array& array) { return (array.flags() & py::array::c_style) != 0; }

bool has_type(const py::array& array, char kind, py::ssize_t size) {
    const py::dtype type = array.dtype();
    return type.kind() == kind && type.itemsize() == size && type.byteorder() != '>';
}

Shape shape_of(const py::array& array) { return Shape(array.shape(), array.shape() + array.ndim()); }

std::size_t extent(const py::array& array, py::ssize_t axis) { return static_cast<std::size_t>(array.shape(axis)); }

Scalar scalar_of(const py::array& array, const char* name) {
    require(is_aligned(array), name, "misaligned");
    if (has_type(array, 'f', 4)) return Scalar::float32;
    if (has_type(array, 'f', 2)) return Scalar::float16;
    refuse(name, "neither float32 nor float16");
}

// Whether the axes except the first, in `order`, outermost first, have the strides of a dense array.
bool images_are_dense(const py::array& array, const std::vector<py::ssize_t>& order) {
    py::ssize_t expected = array.itemsize();
    for (auto axis = order.rbegin(); axis != order.rend(); ++axis) {
        if (array.shape(*axis) != 1 && array.strides(*axis) != expected) return false;
        expected *= array.shape(*axis);
    }
    return true;
}

std::ptrdiff_t image_stride(const py::array& array) { return array.strides(0) / array.itemsize(); }

Batch batch_of(const py::array& array, const std::vector<py::ssize_t>& order, const char* name) {
    const Scalar scalar = scalar_of(array, name);
    require(array.size() == 0 || images_are_dense(array, order), name, "an image is not dense");
    return {array.data(), image_stride(array), scalar};
}

template <class T>
T* output(py::array& array, const Shape& shape, char kind, const char* name) {
    require(has_type(array, kind, sizeof(T)), name, "wrong dtype");
    require(shape_of(array) == shape, name, "wrong shape");
    require(is_dense(array) && is_aligned(array), name, "not contiguous and aligned");
    return static_cast<T*>(array.mutable_data());  // throws when read-only
}

struct Memory {
    const char* name;
    const std::byte* begin;
    const std::byte* end;
};

Memory memory_of(const py::array& array, const char* name) {
    const auto* begin = static_cast<const std::byte*>(array.data());
    const std::byte* end = begin;
    if (array.size() == 0) return {name, begin, end};
    for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
        const py::ssize_t reach = array.strides(axis) * (array.shape(axis) - 1);
        (reach < 0 ? begin : end) += reach;
    }
    return {name, begin, end + array.itemsize()};
}

void require_apart(const std::vector<Memory>& outputs, const std::vector<Memory>& inputs) {
    for (std::size_t i = 0; i < outputs.size(); ++i) {
        const auto overlaps = [&](const Memory& other) {
            return outputs[i].begin < other.end && other.begin < outputs[i].end;
        };
        for (const Memory& input : inputs) require(!overlaps(input), outputs[i].name, "overlaps an input");
        for (std::size_t j = 0; j < i; ++j) require(!overlaps(outputs[j]), outputs[i].name, "overlaps an output");
    }
}

struct Overlay {
    py::array pixels;
    py::array palette;
    double alpha;
    py::array overlays;
};

std::optional<Overlay> overlay_of(const std::optional<py::array>& pixels, const std::optional<py::array>& palette,
                                  double alpha, const std::optional<py::array>& overlays) {
    if (!pixels) return std::nullopt;
    require(palette && overlays, "images", "need palette and overlays");
    return Overlay{*pixels, *palette, alpha, *overlays};
}

void add_overlay(ViewJob& job, Overlay& overlay, const Shape& maps_shape) {
    const auto height = static_cast<py::ssize_t>(job.size.height);
    const auto width = static_cast<py::ssize_t>(job.size.width);
    require(has_type(overlay.pixels, 'u', 1) && shape_of(overlay.pixels) == Shape{maps_shape[0], height, width, 3},
            "images", "not uint8 (N, H, W, 3)");
    require(overlay.pixels.size() == 0 || images_are_dense(overlay.pixels, {1, 2, 3}), "images",
            "an image is not dense");
    require(has_type(overlay.palette, 'u', 1) && shape_of(overlay.palette) == Shape{256, 3} && is_dense(overlay.palette),
            "palette", "not uint8 (256, 3), contiguous");
    require(overlay.alpha >= 0 && overlay.alpha <= 1, "alpha", "not in 0..1");
    job.pixels = static_cast<const std::uint8_t*>(overlay.pixels.data());
    job.pixels_stride = overlay.pixels.strides(0);
    job.palette = static_cast<const std::uint8_t*>(overlay.palette.data());
    job.alpha = overlay.alpha;
    job.overlays = output<std::uint8_t>(overlay.overlays, {maps_shape[0], maps_shape[1], height, width, 3}, 'u',
                                        "overlays");
}

void note_overlay(const std::optional<Overlay>& overlay, std::vector<Memory>& outputs, std::vector<Memory>& inputs) {
    if (!overlay) return;
    outputs.push_back(memory_of(overlay->overlays, "overlays"));
    inputs.push_back(memory_of(overlay->pixels, "images"));
    inputs.push_back(memory_of(overlay->palette, "palette"));
}

Size size_of_images(const py::array& heatmaps) { return {extent(heatmaps, 2), extent(heatmaps, 3)}; }

bool fits_positions(Size size) { return size.height <= UINT32_MAX && size.width <= UINT32_MAX; }

std::optional<std::size_t> render_arrays(const py::array& activations, const py::array& weights, Weighting weighting,
                                         Normalization normalization, bool channels_last, py::array maps,
                                         py::array evidence, py::array heatmaps, const std::optional<py::array>& images,
                                         const std::optional<py::array>& palette, double alpha,
                                         const std::optional<py::array>& overlays, std::size_t threads) {
    require(activations.ndim() == 4, "activations", "not (N, C, h, w)");
    const Shape shape = shape_of(activations);
    const auto [n, c, h, w] = std::tuple(shape[0], shape[1], shape[2], shape[3]);
    require(c > 0 && h > 0 && w > 0, "activations", "empty axis");
    require(weights.ndim() == (weighting == Weighting::channel ? 3 : 5), "weights", "wrong number of axes");
    const py::ssize_t k = weights.shape(1);
    require(shape_of(weights) == (weighting == Weighting::channel ? Shape{n, k, c} : Shape{n, k, c, h, w}), "weights",
            "wrong shape");
    require(heatmaps.ndim() == 4 && heatmaps.shape(2) > 0 && heatmaps.shape(3) > 0, "heatmaps", "not (N, K, H, W)");

    const std::vector<py::ssize_t> weights_order =
        weighting == Weighting::channel ? Shape{1, 2} : channels_last ? Shape{1, 3, 4, 2} : Shape{1, 2, 3, 4};
    MapJob map_job{};
    map_job.activations = batch_of(activations, channels_last ? Shape{2, 3, 1} : Shape{1, 2, 3}, "activations");
    map_job.weights = batch_of(weights, weights_order, "weights");
    map_job.channel_order = channels_last ? ChannelOrder::channels_last : ChannelOrder::channels_first;
    map_job.weighting = weighting;
    map_job.normalization = normalization;
    map_job.channels = static_cast<std::size_t>(c);
    map_job.maps = output<float>(maps, {n, k, h, w}, 'f', "maps");
    map_job.evidence = output<float>(evidence, {n, k}, 'f', "evidence");

    ViewJob view_job{};
    view_job.maps = map_job.maps;
    view_job.map_size = {static_cast<std::size_t>(h), static_cast<std::size_t>(w)};
    view_job.size = size_of_images(heatmaps);
    require(fits_positions(view_job.map_size), "activations", "too large");
    view_job.heatmaps = output<float>(heatmaps, {n, k, heatmaps.shape(2), heatmaps.shape(3)}, 'f', "heatmaps");

    std::optional<Overlay> overlay = overlay_of(images, palette, alpha, overlays);
    if (overlay) add_overlay(view_job, *overlay, {n, k});
    std::vector<Memory> outputs{memory_of(maps, "maps"), memory_of(evidence, "evidence"),
                                memory_of(heatmaps, "heatmaps")};
    std::vector<Memory> inputs{memory_of(activations, "activations"), memory_of(weights, "weights")};
    note_overlay(overlay, outputs, inputs);
    require_apart(outputs, inputs);

    const Unlocked unlocked;
    return render({static_cast<std::size_t>(n), static_cast<std::size_t>(k)}, map_job, view_job, threads);
}

std::optional<std::size_t> view_arrays(const py::array& maps, std::size_t height, std::size_t width,
                                       std::optional<py::array> heatmaps, const std::optional<py::array>& images,
                                       const std::optional<py::array>& palette, double alpha,
                                       const std::optional<py::array>& overlays, std::size_t threads) {
    require(maps.ndim() == 4 && has_type(maps, 'f', 4) && is_dense(maps) && is_aligned(maps), "maps",
            "not float32 (N, K, h, w), contiguous and aligned");
    require(maps.shape(2) > 0 && maps.shape(3) > 0, "maps", "empty axis");
    require(height > 0 && width > 0, "size", "not positive");
    const Shape count{maps.shape(0), maps.shape(1)};

    ViewJob job{};
    job.maps = static_cast<const float*>(maps.data());
    job.map_size = {extent(maps, 2), extent(maps, 3)};
    job.size = {height, width};
    require(fits_positions(job.map_size), "maps", "too large");
    std::vector<Memory> outputs;
    std::vector<Memory> inputs{memory_of(maps, "maps")};
    if (heatmaps) {
        const Shape shape{count[0], count[1], static_cast<py::ssize_t>(height), static_cast<py::ssize_t>(width)};
        job.heatmaps = output<float>(*heatmaps, shape, 'f', "heatmaps");
        outputs.push_back(memory_of(*heatmaps, "heatmaps"));
    }
    std::optional<Overlay> overlay = overlay_of(images, palette, alpha, overlays);
    if (overlay) add_overlay(job, *overlay, count);
    note_overlay(overlay, outputs, inputs);
    require_apart(outputs, inputs);

    const Unlocked unlocked;
    return view({static_cast<std::size_t>(count[0]), static_cast<std::size_t>(count[1])}, job, threads);
}

void prepare_array(const py::array& image, const py::array& levels, bool reversed_order, bool channels_last,
                   py::array target) {
    require(image.ndim() == 3 && has_type(image, 'u', 1) && image.shape(2) == 3 && is_dense(image), "image",
            "not uint8 (H, W, 3), contiguous");
    require(has_type(levels, 'f', 4) && shape_of(levels) == Shape{3, 256} && is_dense(levels) && is_aligned(levels),
            "levels", "not float32 (3, 256), contiguous and aligned");
    require(target.ndim() == 3, "target", "not of three axes");
    const py::ssize_t rows = channels_last ? 0 : 1;
    const Shape shape{target.shape(rows), target.shape(rows + 1)};
    PrepareJob job{};
    job.pixels = static_cast<const std::uint8_t*>(image.data());
    job.source = {extent(image, 0), extent(image, 1)};
    job.target = {extent(target, rows), extent(target, rows + 1)};
    job.levels = static_cast<const float*>(levels.data());
    job.reversed_order = reversed_order;
    job.channels_last = channels_last;
    job.input = output<float>(
        target, channels_last ? Shape{shape[0], shape[1], 3} : Shape{3, shape[0], shape[1]}, 'f', "target");
    require(job.source.area() > 0 && job.target.area() > 0, "image", "empty");
    require(fits_positions(job.source) && job.source.height / job.target.height < most_shrinking &&
                job.source.width / job.target.width < most_shrinking,
            "image", "too large");
    require_apart({memory_of(target, "target")}, {memory_of(image, "image"), memory_of(levels, "levels")});

    const Unlocked unlocked;
    prepare(job);
}

std::optional<std::size_t> first_not_finite_row(const py::array& array) {
    require(array.ndim() > 0 && has_type(array, 'f', 4) && is_dense(array) && is_aligned(array), "array",
            "not float32, contiguous and aligned");
    const std::size_t rows = extent(array, 0);
    const std::size_t columns = rows == 0 ? 0 : static_cast<std::size_t>(array.size()) / rows;
    const auto* const values = static_cast<const float*>(array.data());
    const Unlocked unlocked;
    return first_not_finite(values, rows, columns);
}

}  // namespace

PYBIND11_MODULE(_cpu, module, py::mod_gil_not_used()) {
    module.doc() = "The CPU kernels. Called through fastcam.kernels, which validates and explains.";
    close_calls_at_exit();

    py::enum_<Weighting>(module, "Weighting")
        .value("channel", Weighting::channel)
        .value("pooled", Weighting::pooled)
        .value("element", Weighting::element);
    py::enum_<Normalization>(module, "Normalization")
        .value("none", Normalization::none)
        .value("max", Normalization::max)
        .value("minmax", Normalization::minmax);

    module.def("render", &render_arrays, py::arg("activations").noconvert(), py::arg("weights").noconvert(),
               py::arg("weighting"), py::arg("normalization"), py::arg("channels_last"), py::arg("maps").noconvert(),
               py::arg("evidence").noconvert(), py::arg("heatmaps").noconvert(), py::arg("images").noconvert(), py::arg("palette").noconvert(),
               py::arg("alpha"), py::arg("overlays").noconvert(), py::arg("threads"));
    module.def("view", &view_arrays, py::arg("maps").noconvert(), py::arg("height"), py::arg("width"),
               py::arg("heatmaps").noconvert(), py::arg("images").noconvert(), py::arg("palette").noconvert(),
               py::arg("alpha"), py::arg("overlays").noconvert(), py::arg("threads"));
    module.def("prepare", &prepare_array, py::arg("image").noconvert(), py::arg("levels").noconvert(),
               py::arg("reversed_order"), py::arg("channels_last"), py::arg("target").noconvert());
    module.def("first_not_finite", &first_not_finite_row, py::arg("array").noconvert());

    bind_convolutions(module);
    module.def("instruction_sets", &instruction_sets);
    module.def("instruction_set", &instruction_set);
    module.def("use_instruction_set", &use_instruction_set);
    module.def("processor_count", &processor_count);
}

}  // namespace fastcam
