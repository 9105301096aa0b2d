#include "bindings_convolution.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "convolution.hpp"
#include "custom_ops.hpp"
#include "thread_pool.hpp"

namespace py = pybind11;

namespace fastcam {
namespace {

using Floats = py::array_t<float, py::array::c_style>;

ConvolutionLayer layer_of(std::array<std::size_t, 2> channels, std::array<std::size_t, 2> kernel, std::size_t stride,
                          std::array<std::size_t, 4> pads, bool channels_first, bool residual, bool pool, float low,
                          float high) {
    ConvolutionLayer layer;
    layer.input_channels = channels[0];
    layer.output_channels = channels[1];
    layer.kernel_height = kernel[0];
    layer.kernel_width = kernel[1];
    layer.stride = stride;
    layer.pad_top = pads[0];
    layer.pad_left = pads[1];
    layer.pad_bottom = pads[2];
    layer.pad_right = pads[3];
    layer.input_layout = channels_first ? Layout::channels_first : Layout::channels_last;
    layer.residual = residual;
    layer.pool = pool;
    layer.low = low;
    layer.high = high;
    return layer;
}

// The threads of this process, behind the interface for foreign threads.
struct ProcessThreads {
    std::size_t threads;

    static void run(void* pool, std::size_t tasks, ParallelFor::Task task, void* context) {
        const auto& self = *static_cast<const ProcessThreads*>(pool);
        ThreadPool::of_process().run(tasks, self.threads, [&](std::size_t index) { task(context, index); });
    }
};

const float* floats(const Floats& array, const std::vector<std::size_t>& shape, const char* name) {
    if (!std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim())) {
        throw std::invalid_argument(std::string(name) + ": not of the layer's shape");
    }
    return array.data();
}

std::unique_ptr<Published<Convolution>> published_convolution(const ConvolutionLayer& layer, Algorithm algorithm,
                                                            const Floats& weights,
                                                            const std::optional<Floats>& bias, std::size_t threads) {
    const float* const kernel = floats(
        weights, {layer.output_channels, layer.input_channels, layer.kernel_height, layer.kernel_width}, "weights");
    const float* const offsets = bias ? floats(*bias, {layer.output_channels}, "bias") : nullptr;
    const py::gil_scoped_release release;
    ProcessThreads pool{threads};
    return std::make_unique<Published<Convolution>>(
        Convolution(layer, algorithm, kernel, offsets, ParallelFor{&ProcessThreads::run, &pool, threads}));
}

std::unique_ptr<Published<Dense>> published_dense(std::size_t inputs, std::size_t outputs, const std::optional<Floats>& bias,
                                                  float low, float high, const py::iterable& blocks) {
    Dense dense(inputs, outputs, low, high);
    if (bias) dense.set_bias(floats(*bias, {outputs}, "bias"));
    std::size_t row = 0;
    for (const py::handle& item : blocks) {
        const auto block = py::cast<Floats>(item);
        const std::size_t count = block.ndim() == 2 ? static_cast<std::size_t>(block.shape(0)) : 0;
        if (count == 0 || count > inputs - row) throw std::invalid_argument("blocks: other rows than the layer's inputs");
        const float* const weights = floats(block, {count, outputs}, "blocks");
        const py::gil_scoped_release release;
        if (!dense.set_rows(row, count, weights)) return nullptr;
        row += count;
    }
    if (row != inputs) throw std::invalid_argument("blocks: fewer rows than the layer's inputs");
    return std::make_unique<Published<Dense>>(std::move(dense));
}

}  // namespace

void bind_convolutions(py::module_& module) {
    py::class_<ConvolutionLayer>(module, "ConvolutionLayer")
        .def(py::init(&layer_of), py::kw_only(), py::arg("channels"), py::arg("kernel"), py::arg("stride"),
             py::arg("pads"), py::arg("channels_first"), py::arg("residual"), py::arg("pool"), py::arg("low"),
             py::arg("high"));
    py::enum_<Algorithm>(module, "Algorithm")
        .value("winograd_4x4", Algorithm::winograd_4x4)
        .value("winograd_6x6", Algorithm::winograd_6x6)
        .value("pointwise", Algorithm::pointwise)
        .value("gathered", Algorithm::gathered);
    module.def("convolution_supported", &convolution_supported);
    module.def("choose_algorithm", &choose_algorithm, py::arg("layer"), py::arg("height"), py::arg("width"));
    // A session's nodes look it up by its number while the session opens.
    py::class_<Published<Convolution>>(module, "PublishedConvolution")
        .def(py::init(&published_convolution), py::arg("layer"), py::arg("algorithm"), py::arg("weights").noconvert(),
             py::arg("bias").noconvert(), py::arg("threads"))
        .def_property_readonly("number", &Published<Convolution>::number);
    // None if a weight is not finite: zeros must not be skipped then. blocks: the weights, a few rows at a time.
    py::class_<Published<Dense>>(module, "PublishedDense")
        .def_static("publish", &published_dense, py::arg("inputs"), py::arg("outputs"), py::arg("bias").noconvert(),
                    py::arg("low"), py::arg("high"), py::arg("blocks"))
        .def_property_readonly("number", &Published<Dense>::number);
}

}  // namespace fastcam
