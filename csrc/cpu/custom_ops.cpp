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

class Registry {
public:
    std::int64_t add(std::shared_ptr<const Convolution> convolution) {
        const std::lock_guard lock(mutex_);
        convolutions_.emplace(++last_, std::move(convolution));
        return last_;
    }

    void remove(std::int64_t number) {
        const std::lock_guard lock(mutex_);
        convolutions_.erase(number);
    }

    // Null where no such number is published.
    std::shared_ptr<const Convolution> find(std::int64_t number) {
        const std::lock_guard lock(mutex_);
        const auto found = convolutions_.find(number);
        return found == convolutions_.end() ? nullptr : found->second;
    }

    static Registry& of_process() {
        static Registry registry;
        return registry;
    }

private:
    std::mutex mutex_;
    std::unordered_map<std::int64_t, std::shared_ptr<const Convolution>> convolutions_;
    std::int64_t last_ = 0;
};

// A Status that ONNX Runtime returned, on its way out of our code.
struct Failure {
    ort::Status* status;
};

void check(ort::Status* status) {
    if (status != nullptr) throw Failure{status};
}

// Exceptions end here: those that call this are C.
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
        return api.CreateStatus(ort::fail, "fastcam's convolution: out of memory");
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

using Shape = std::array<std::int64_t, 4>;

class Kernel {
public:
    Kernel(const ort::Api& api, const ort::KernelInfo* info) : api_(api) {
        const std::int64_t number = integer(info, "number");
        convolution_ = Registry::of_process().find(number);
        if (!convolution_) {
            throw std::invalid_argument("fastcam's convolution " + std::to_string(number) +
                                        " is not published: only Explainer opens sessions with this op");
        }
        threads_ = static_cast<std::size_t>(std::max<std::int64_t>(1, integer(info, "threads")));
        check(api.KernelInfoGetAllocator(info, ort::default_memory, &allocator_));
    }
    ~Kernel() { api_.ReleaseAllocator(allocator_); }
    Kernel(const Kernel&) = delete;
    Kernel& operator=(const Kernel&) = delete;

    const ort::Api& api() const { return api_; }

    void compute(ort::KernelContext* context) const {
        const ConvolutionLayer& layer = convolution_->layer();
        const ort::Value* input = value(context, 0);
        const Shape shape = shape_of(input, "input");
        const bool last = layer.input_layout == Layout::channels_last;
        const auto batch = extent(shape[0]), height = extent(shape[last ? 1 : 2]), width = extent(shape[last ? 2 : 3]);
        if (extent(shape[last ? 3 : 1]) != layer.input_channels) {
            throw std::invalid_argument("fastcam's convolution: the input has another number of channels");
        }
        const OutputSize size = convolution_->output_size(height, width);
        const Shape result{shape[0], static_cast<std::int64_t>(size.height), static_cast<std::int64_t>(size.width),
                           static_cast<std::int64_t>(layer.output_channels)};
        const ort::Value* residual = layer.residual ? value(context, 1) : nullptr;
        if (residual != nullptr && shape_of(residual, "residual") != result) {
            throw std::invalid_argument("fastcam's convolution: the residual has another shape than the output");
        }
        ort::Value* output = nullptr;
        check(api_.KernelContext_GetOutput(context, 0, result.data(), result.size(), &output));
        if (batch == 0 || size.height == 0 || size.width == 0) return;
        const Scratch scratch(api_, allocator_, convolution_->scratch_bytes(batch, height, width, threads_));
        Pool pool{api_, context};
        const ParallelFor parallel{&Pool::run, &pool, threads_};
        convolution_->run(data_of(input), residual == nullptr ? nullptr : data_of(residual), data_of(output), batch,
                          height, width, scratch.get(), parallel);
        check(pool.status);
    }

private:
    // The session's threads. A failure is kept for the end: what calls this does not know of it.
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

    const ort::Value* value(const ort::KernelContext* context, std::size_t index) const {
        const ort::Value* found = nullptr;
        check(api_.KernelContext_GetInput(context, index, &found));
        if (found == nullptr) throw std::invalid_argument("fastcam's convolution: an input is missing");
        return found;
    }

    Shape shape_of(const ort::Value* value, const char* name) const {
        ort::TensorTypeAndShapeInfo* info = nullptr;
        check(api_.GetTensorTypeAndShape(value, &info));
        std::size_t rank = 0;
        Shape shape{};
        ort::Status* status = api_.GetDimensionsCount(info, &rank);
        if (status == nullptr && rank == shape.size()) status = api_.GetDimensions(info, shape.data(), rank);
        api_.ReleaseTensorTypeAndShapeInfo(info);
        check(status);
        if (rank != shape.size()) throw std::invalid_argument(std::string("fastcam's convolution: the rank of its ") + name + " is not 4");
        return shape;
    }

    // Their function that reads takes no constant.
    float* data_of(const ort::Value* value) const {
        void* data = nullptr;
        check(api_.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
        return static_cast<float*>(data);
    }

    static std::size_t extent(std::int64_t size) { return static_cast<std::size_t>(std::max<std::int64_t>(0, size)); }

    const ort::Api& api_;
    std::shared_ptr<const Convolution> convolution_;
    std::size_t threads_ = 1;
    ort::Allocator* allocator_ = nullptr;
};

ort::CustomOp described_op() {
    ort::CustomOp op{};
    op.version = ort::api_version;
    op.GetName = [](const ort::CustomOp*) { return "Convolution"; };
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
        return guarded(*api, [&] { *kernel = new Kernel(*api, info); });
    };
    op.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
        const auto& self = *static_cast<const Kernel*>(kernel);
        return guarded(self.api(), [&] { self.compute(context); });
    };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

// Sessions refer to the domain without owning it: one serves all of them, for as long as the process lives.
ort::CustomOpDomain* domain_of_process(const ort::Api& api) {
    static const ort::CustomOp op = described_op();
    static ort::CustomOpDomain* const domain = [&] {
        ort::CustomOpDomain* created = nullptr;
        check(api.CreateCustomOpDomain("fastcam", &created));
        check(api.CustomOpDomain_Add(created, &op));
        return created;
    }();
    return domain;
}

}  // namespace

PublishedConvolution::PublishedConvolution(Convolution convolution)
    : convolution_(std::make_shared<const Convolution>(std::move(convolution))),
      number_(Registry::of_process().add(convolution_)) {}

PublishedConvolution::~PublishedConvolution() { Registry::of_process().remove(number_); }

}  // namespace fastcam

// What ONNX Runtime's register_custom_ops_library looks for.
FASTCAM_EXPORT fastcam::onnxruntime::Status* RegisterCustomOps(fastcam::onnxruntime::SessionOptions* options,
                                                               const fastcam::onnxruntime::ApiBase* base) {
    using namespace fastcam;
    const ort::Api* api = base->GetApi(ort::api_version);
    if (api == nullptr) {
        // Every version has its first entry.
        return base->GetApi(1)->CreateStatus(ort::fail, "fastcam's convolutions need ONNX Runtime 1.20 or newer");
    }
    return guarded(*api, [&] { check(api->AddCustomOpDomain(options, domain_of_process(*api))); });
}
