// Python module `_cuda`: launches of the kernels, and the calls of the CUDA runtime that a device layer needs.
// Addresses, streams and events are integers; their owner is the Python side. CUDA errors raise DeviceError, failed
// launches KernelError, with CUDA's own message.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../gil.hpp"
#include "cam_cuda.hpp"

namespace py = pybind11;

namespace fastcam {
namespace {

using Address = std::uintptr_t;

struct DeviceFailure : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct KernelFailure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::string words_of(cudaError_t status) {
    return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clears the error, so that the next call does not report it
    throw DeviceFailure(std::string(what) + ": " + words_of(status));
}

void translate(std::exception_ptr thrown) {
    const auto raise = [](const char* name, const std::exception& error) {
        const py::object kind = py::module_::import("fastcam.errors").attr(name);
        PyErr_SetString(kind.ptr(), error.what());
    };
    try {
        if (thrown) std::rethrow_exception(thrown);
    } catch (const DeviceFailure& error) {
        raise("DeviceError", error);
    } catch (const KernelFailure& error) {
        raise("KernelError", error);
    }
}

void* pointer(Address address) { return reinterpret_cast<void*>(address); }
cudaStream_t stream_of(Address address) { return static_cast<cudaStream_t>(pointer(address)); }
cudaEvent_t event_of(Address address) { return static_cast<cudaEvent_t>(pointer(address)); }

template <class T>
Address address_of(T* handle) {
    return reinterpret_cast<Address>(handle);
}

int device_count() {
    int count = 0;
    check(cudaGetDeviceCount(&count), "CUDA devices");
    return count;
}

int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
    return value;
}

std::pair<int, int> compute_capability(int device) {
    return {attribute(cudaDevAttrComputeCapabilityMajor, device), attribute(cudaDevAttrComputeCapabilityMinor, device)};
}

std::string device_name(int device) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), "device properties");
    return properties.name;
}

std::pair<std::size_t, std::size_t> memory_info() {
    std::size_t free = 0;
    std::size_t total = 0;
    check(cudaMemGetInfo(&free, &total), "device memory");
    return {free, total};
}

std::pair<int, int> versions() {
    int driver = 0;
    int runtime = 0;
    check(cudaDriverGetVersion(&driver), "driver version");
    check(cudaRuntimeGetVersion(&runtime), "runtime version");
    return {driver, runtime};
}

Address allocate(std::size_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), ("allocate " + std::to_string(bytes) + " bytes on the device").c_str());
    return address_of(memory);
}

Address allocate_pinned(std::size_t bytes) {
    void* memory = nullptr;
    check(cudaMallocHost(&memory, bytes), ("allocate " + std::to_string(bytes) + " bytes of pinned memory").c_str());
    return address_of(memory);
}

Address create_stream() {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "create a stream");
    return address_of(stream);
}

Address create_event(bool timed) {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, timed ? cudaEventDefault : cudaEventDisableTiming), "create an event");
    return address_of(event);
}

float elapsed_ms(Address start, Address end) {
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, event_of(start), event_of(end)), "time between events");
    return milliseconds;
}

void copy(Address target, Address source, std::size_t bytes, Address stream, cudaMemcpyKind kind) {
    check(cudaMemcpyAsync(pointer(target), pointer(source), bytes, kind, stream_of(stream)), "copy");
}

const std::array<CudaKernels, 4>& tables() {
    static const std::array<CudaKernels, 4> all{cuda_kernels_any(), cuda_kernels_float32(), cuda_kernels_float16(),
                                                cuda_kernels_bfloat16()};
    return all;
}

template <class Body>
void for_each_kernel(const Body& body) {
    for (const CudaKernels& table : tables()) {
        for (std::size_t i = 0; i < table.count; ++i) body(table.first[i]);
    }
}

std::vector<std::pair<std::string, std::size_t>> kernels() {
    std::vector<std::pair<std::string, std::size_t>> found;
    for_each_kernel([&](const CudaKernel& kernel) { found.emplace_back(kernel.name, kernel.argument_size); });
    return found;
}

const CudaKernel& kernel_of(const std::string& name) {
    const CudaKernel* found = nullptr;
    for_each_kernel([&](const CudaKernel& kernel) {
        if (name == kernel.name) found = &kernel;
    });
    if (!found) throw KernelFailure("no kernel '" + name + "'");
    return *found;
}

void launch(const std::string& name, unsigned blocks, unsigned threads, std::size_t shared_bytes,
            const std::string& arguments, Address stream) {
    const CudaKernel& kernel = kernel_of(name);
    if (arguments.size() != kernel.argument_size) {
        throw KernelFailure(name + ": " + std::to_string(arguments.size()) + " bytes of arguments instead of " +
                            std::to_string(kernel.argument_size));
    }
    void* argument = const_cast<char*>(arguments.data());
    const cudaError_t status = cudaLaunchKernel(kernel.function, dim3(blocks), dim3(threads), &argument, shared_bytes,
                                                stream_of(stream));
    if (status == cudaSuccess) return;
    cudaGetLastError();
    throw KernelFailure(name + ": " + words_of(status));
}

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
    module.doc() = "The CUDA kernels and the CUDA runtime. Called through fastcam.kernels.cuda and the device layer.";
    py::register_local_exception_translator(&translate);
    close_calls_at_exit();
    using WithoutLock = py::call_guard<Unlocked>;

    module.def("device_count", &device_count, WithoutLock());
    module.def("set_device", [](int device) { check(cudaSetDevice(device), "choose a device"); }, py::arg("device"),
               WithoutLock());
    module.def("device_name", &device_name, py::arg("device"), WithoutLock());
    module.def("compute_capability", &compute_capability, py::arg("device"));
    module.def("l2_bytes", [](int device) { return attribute(cudaDevAttrL2CacheSize, device); }, py::arg("device"));
    module.def("memory_info", &memory_info, WithoutLock());
    module.def("versions", &versions);

    module.def("allocate", &allocate, py::arg("size"), WithoutLock());
    module.def("free", [](Address memory) { check(cudaFree(pointer(memory)), "free device memory"); },
               py::arg("memory"), WithoutLock());
    module.def("allocate_pinned", &allocate_pinned, py::arg("size"), WithoutLock());
    module.def("free_pinned", [](Address memory) { check(cudaFreeHost(pointer(memory)), "free pinned memory"); },
               py::arg("memory"), WithoutLock());

    module.def("create_stream", &create_stream, WithoutLock());
    module.def("destroy_stream", [](Address stream) { check(cudaStreamDestroy(stream_of(stream)), "destroy a stream"); },
               py::arg("stream"), WithoutLock());
    module.def("synchronize_stream",
               [](Address stream) { check(cudaStreamSynchronize(stream_of(stream)), "wait for a stream"); },
               py::arg("stream"), WithoutLock());

    module.def("create_event", &create_event, py::arg("timed") = false, WithoutLock());
    module.def("destroy_event", [](Address event) { check(cudaEventDestroy(event_of(event)), "destroy an event"); },
               py::arg("event"), WithoutLock());
    module.def("record_event",
               [](Address event, Address stream) {
                   check(cudaEventRecord(event_of(event), stream_of(stream)), "record an event");
               },
               py::arg("event"), py::arg("stream"));
    module.def("wait_event",
               [](Address stream, Address event) {
                   check(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0), "make a stream wait");
               },
               py::arg("stream"), py::arg("event"));
    module.def("synchronize_event",
               [](Address event) { check(cudaEventSynchronize(event_of(event)), "wait for an event"); },
               py::arg("event"), WithoutLock());
    module.def("elapsed_ms", &elapsed_ms, py::arg("start"), py::arg("end"));

    const auto copying = [&](const char* name, cudaMemcpyKind kind) {
        module.def(name,
                   [kind](Address target, Address source, std::size_t bytes, Address stream) {
                       copy(target, source, bytes, stream, kind);
                   },
                   py::arg("target"), py::arg("source"), py::arg("size"), py::arg("stream"), WithoutLock());
    };
    copying("copy_to_device", cudaMemcpyHostToDevice);
    copying("copy_to_host", cudaMemcpyDeviceToHost);
    copying("copy_on_device", cudaMemcpyDeviceToDevice);
    module.def("fill",
               [](Address target, int value, std::size_t bytes, Address stream) {
                   check(cudaMemsetAsync(pointer(target), value, bytes, stream_of(stream)), "fill memory");
               },
               py::arg("target"), py::arg("value"), py::arg("size"), py::arg("stream"));

    module.def("kernels", &kernels);
    module.def("launch",
               [](const std::string& kernel, unsigned blocks, unsigned threads, std::size_t shared_bytes,
                  const py::bytes& arguments, Address stream) {
                   launch(kernel, blocks, threads, shared_bytes, arguments, stream);
               },
               py::arg("kernel"), py::arg("blocks"), py::arg("threads"), py::arg("shared_bytes"), py::arg("arguments"),
               py::arg("stream"));
}

}  // namespace fastcam
