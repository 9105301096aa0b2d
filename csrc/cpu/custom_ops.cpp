#include "custom_ops.hpp"

#include <algorithm>
#include <array>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "onnxruntime_api.hpp"

#if defined(_WIN32)
#define FASTCAM_EXPORT extern "C" __declspec(dllexport)
#else
#define FASTCAM_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace fastcam {
namespace {

namespace ort = onnxruntime;

template <class Layer>
class Registry {
public:
    std::int64_t add(Layer layer) {
        auto shared = std::make_shared<const Layer>(std::move(layer));
        const std::lock_guard lock(mutex_);
        layers_.emplace(++last_, std::move(shared));
        return last_;
    }

    void remove(std::int64_t number) {
        const std::lock_guard lock(mutex_);
        layers_.erase(number);
    }

    std::shared_ptr<const Layer> find(std::int64_t number) {
        const std::lock_guard lock(mutex_);
        const auto found = layers_.find(number);
        if (found == layers_.end()) {
            throw std::invalid_argument("fastcam's layer " + std::to_string(number) +
                                        " is not published: only Explainer opens sessions with this op");
        }
        return found->second;
    }

    static Registry& of_process() {
        static Registry registry;
        return registry;
    }

private:
    std::mutex mutex_;
    std::unordered_map<std::int64_t, std::shared_ptr<const Layer>> layers_;
    std::int64_t last_ = 0;
};

// A Status that ONNX Runtime returned, propagated out of our code.
struct Failure {
    ort::Status* status;
};

void check(ort::Status* status) {
    if (status != nullptr) throw Failure{status};
}

// Exceptions stop here: the callers are C.
template <class Body>
ort::Status* guarded(const ort::Api& api, Body&& body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const std::invalid_argument& error) {
        return api.CreateStatus(ort::invalid_argument, error.what());
    } catch (const std::bad_alloc&) {
        return api.CreateStatus(ort::fail, "fastcam's layer: out of memory");
    } catch (const std::exception& error) {
        return api.CreateStatus(ort::fail, error.what());
    }
}

// Memory of the session's allocator for one call.
class Scratch {
public:
    Scratch(const ort::Api& api, ort::Allocator* allocator, std::size_t bytes) : api_(api), allocator_(allocator) {
        if (bytes > 0) check(api.AllocatorAlloc(allocator, bytes, &memory_));
        if (bytes > 0 && memory_ == nullptr) throw std::bad_alloc();
    }
    ~Scratch() {
        if (memory_ == nullptr) return;
        if (ort::Status* status = api_.AllocatorFree(allocator_, memory_)) api_.ReleaseStatus(status);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    void* get() const { return memory_; }

private:
    const ort::Api& api_;
    ort::Allocator* allocator_;
    void* memory_ = nullptr;
};

template <std::size_t rank>
using Shape = std::array<std::int64_t, rank>;

std::size_t extent(std::int64_t size) { return static_cast<std::size_t>(std::max<std::int64_t>(0, size)); }

// One node of a session.
class Node {
public:
    Node(const ort::Api& api, const ort::KernelInfo* info)
        : api_(api), number_(integer(info, "number")), threads_(std::max<std::size_t>(1, extent(integer(info, "threads")))) {
        check(api.KernelInfoGetAllocator(info, ort::default_memory, &allocator_));
    }
    ~Node() { api_.ReleaseAllocator(allocator_); }
    Node(const Node&) = delete;
    Node& operator=(const Node&) = delete;

    const ort::Api& api() const { return api_; }
    std::int64_t number() const { return number_; }
    std::size_t threads() const { return threads_; }

    Scratch scratch(std::size_t bytes) const { return Scratch(api_, allocator_, bytes); }

    const ort::Value* input(const ort::KernelContext* context, std::size_t index) const {
        const ort::Value* found = nullptr;
        check(api_.KernelContext_GetInput(context, index, &found));
        if (found == nullptr) throw std::invalid_argument("fastcam's layer: an input is missing");
        return found;
    }

    template <std::size_t rank>
    float* output(ort::KernelContext* context, const Shape<rank>& shape) const {
        ort::Value* value = nullptr;
        check(api_.KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &value));
        return data(value);
    }

    template <std::size_t rank>
    Shape<rank> shape(const ort::Value* value) const {
        ort::TensorTypeAndShapeInfo* info = nullptr;
        check(api_.GetTensorTypeAndShape(value, &info));
        std::size_t found = 0;
        Shape<rank> shape{};
        ort::Status* status = api_.GetDimensionsCount(info, &found);
        if (status == nullptr && found == rank) status = api_.GetDimensions(info, shape.data(), rank);
        api_.ReleaseTensorTypeAndShapeInfo(info);
        check(status);
        if (found != rank) throw std::invalid_argument("fastcam's layer: an input has another rank");
        return shape;
    }

    // ONNX Runtime's reading function is not const-correct.
    float* data(const ort::Value* value) const {
        void* data = nullptr;
        check(api_.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
        return static_cast<float*>(data);
    }

    // Calls body(ParallelFor) with the session's threads.
    template <class Body>
    void on_threads(ort::KernelContext* context, Body&& body) const {
        Pool pool{api_, context};
        body(ParallelFor{&Pool::run, &pool, threads_});
        check(pool.status);
    }

private:
    // A failure is kept for the end: the caller cannot handle it.
    struct Pool {
        const ort::Api& api;
        ort::KernelContext* context;
        ort::Status* status = nullptr;

        static void run(void* pool, std::size_t tasks, ParallelFor::Task task, void* data) {
            auto& self = *static_cast<Pool*>(pool);
            ort::Status* status = self.api.KernelContext_ParallelFor(self.context, task, tasks, 0, data);
            if (status == nullptr) return;
            if (self.status == nullptr) {
                self.status = status;
            } else {
                self.api.ReleaseStatus(status);
            }
        }
    };

    std::int64_t integer(const ort::KernelInfo* info, const char* name) const {
        std::int64_t number = 0;
        check(api_.KernelInfoGetAttribute_int64(info, name, &number));
        return number;
    }

    const ort::Api& api_;
    std::int64_t number_;
    std::size_t threads_;
    ort::Allocator* allocator_ = nullptr;
};

void compute(const Convolution& convolution, const Node& node, ort::KernelContext* context) {
    const ConvolutionLayer& layer = convolution.layer();
    const ort::Value* const input = node.input(context, 0);
    const Shape<4> shape = node.shape<4>(input);
    const bool last = layer.input_layout == Layout::channels_last;
    const std::size_t batch = extent(shape[0]), height = extent(shape[last ? 1 : 2]), width = extent(shape[last ? 2 : 3]);
    if (extent(shape[last ? 3 : 1]) != layer.input_channels) {
        throw std::invalid_argument("fastcam's convolution: the input has another number of channels");
    }
    const OutputSize size = convolution.output_size(height, width);
    const Shape<4> result{shape[0], static_cast<std::int64_t>(size.height), static_cast<std::int64_t>(size.width),
                          static_cast<std::int64_t>(layer.output_channels)};
    const ort::Value* const residual = layer.residual ? node.input(context, 1) : nullptr;
    if (residual != nullptr && node.shape<4>(residual) != result) {
        throw std::invalid_argument("fastcam's convolution: the residual has another shape than the output");
    }
    float* const output = node.output(context, result);
    if (batch == 0 || size.height == 0 || size.width == 0) return;
    const Scratch scratch = node.scratch(convolution.scratch_bytes(batch, height, width, node.threads()));
    node.on_threads(context, [&](const ParallelFor& parallel) {
        convolution.run(node.data(input), residual == nullptr ? nullptr : node.data(residual), output, batch, height,
                        width, scratch.get(), parallel);
    });
}

void compute(const Dense& dense, const Node& node, ort::KernelContext* context) {
    const ort::Value* const input = node.input(context, 0);
    const Shape<2> shape = node.shape<2>(input);
    if (extent(shape[1]) != dense.inputs()) {
        throw std::invalid_argument("fastcam's dense layer: the input has another number of columns");
    }
    float* const output = node.output(context, Shape<2>{shape[0], static_cast<std::int64_t>(dense.outputs())});
    const std::size_t batch = extent(shape[0]);
    if (batch == 0) return;
    const Scratch scratch = node.scratch(dense.scratch_bytes(batch));
    node.on_threads(context, [&](const ParallelFor& parallel) {
        dense.run(node.data(input), output, batch, scratch.get(), parallel);
    });
}

// A node with its layer.
template <class Layer>
struct Kernel {
    Kernel(const ort::Api& api, const ort::KernelInfo* info)
        : node(api, info), layer(Registry<Layer>::of_process().find(node.number())) {}

    Node node;
    std::shared_ptr<const Layer> layer;
};

template <class Layer>
constexpr const char* op_name = nullptr;
template <>
constexpr const char* op_name<Convolution> = "Convolution";
template <>
constexpr const char* op_name<Dense> = "Dense";

template <class Layer>
ort::CustomOp described_op() {
    ort::CustomOp op{};
    op.version = ort::api_version;
    op.GetName = [](const ort::CustomOp*) { return op_name<Layer>; };
    op.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };
    op.GetInputTypeCount = [](const ort::CustomOp*) -> std::size_t { return 2; };
    op.GetInputType = [](const ort::CustomOp*, std::size_t) { return ort::float_tensor; };
    op.GetInputCharacteristic = [](const ort::CustomOp*, std::size_t index) {
        return index == 0 ? ort::required : ort::optional;
    };
    op.GetInputMemoryType = [](const ort::CustomOp*, std::size_t) { return ort::default_memory; };
    op.GetOutputTypeCount = [](const ort::CustomOp*) -> std::size_t { return 1; };
    op.GetOutputType = [](const ort::CustomOp*, std::size_t) { return ort::float_tensor; };
    op.GetOutputCharacteristic = [](const ort::CustomOp*, std::size_t) { return ort::required; };
    op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
    op.GetEndVersion = [](const ort::CustomOp*) { return 1; };
    op.CreateKernelV2 = [](const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
        return guarded(*api, [&] { *kernel = new Kernel<Layer>(*api, info); });
    };
    op.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
        const auto& self = *static_cast<const Kernel<Layer>*>(kernel);
        return guarded(self.node.api(), [&] { compute(*self.layer, self.node, context); });
    };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel<Layer>*>(kernel); };
    return op;
}

// Sessions refer to the domain without owning it: one serves all of them for the lifetime of the process.
ort::CustomOpDomain* domain_of_process(const ort::Api& api) {
    static const ort::CustomOp convolution = described_op<Convolution>(), dense = described_op<Dense>();
    static ort::CustomOpDomain* const domain = [&] {
        ort::CustomOpDomain* created = nullptr;
        check(api.CreateCustomOpDomain("fastcam", &created));
        check(api.CustomOpDomain_Add(created, &convolution));
        check(api.CustomOpDomain_Add(created, &dense));
        return created;
    }();
    return domain;
}

}  // namespace

template <class Layer>
Published<Layer>::Published(Layer layer) : number_(Registry<Layer>::of_process().add(std::move(layer))) {}

template <class Layer>
Published<Layer>::~Published() {
    Registry<Layer>::of_process().remove(number_);
}

template class Published<Convolution>;
template class Published<Dense>;

}  // namespace fastcam

// What ONNX Runtime's register_custom_ops_library looks for.
FASTCAM_EXPORT fastcam::onnxruntime::Status* RegisterCustomOps(fastcam::onnxruntime::SessionOptions* options,
                                                               const fastcam::onnxruntime::ApiBase* base) {
    using namespace fastcam;
    const ort::Api* api = base->GetApi(ort::api_version);
    if (api == nullptr) {
        // Every version has the first entry.
        return base->GetApi(1)->CreateStatus(ort::fail, "fastcam's convolutions need ONNX Runtime 1.20 or newer");
    }
    return guarded(*api, [&] { check(api->AddCustomOpDomain(options, domain_of_process(*api))); });
}
