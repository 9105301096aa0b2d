// The kernels of cam_kernels.cuh as a library of C functions, for the Python tests.
#include "cuda_shim.hpp"

#include "../cuda/cam_kernels.cuh"

namespace {

struct Entry {
    const char* name;
    std::size_t size;
    cuda_shim::Kernel kernel;
};

#define CAM_ENTRY(kernel, Call, blocks, ...) \
    {#kernel, sizeof(Call), [](const void* call) { kernel(*static_cast<const Call*>(call)); }},

constexpr Entry entries[] = {CAM_FOR_EACH_KERNEL(CAM_ENTRY)};

const Entry& entry_of(const char* name, std::size_t size) {
    for (const Entry& entry : entries) {
        if (std::strcmp(entry.name, name) != 0) continue;
        if (entry.size != size) {
            throw std::invalid_argument(std::to_string(size) + " bytes of arguments instead of " +
                                        std::to_string(entry.size));
        }
        return entry;
    }
    throw std::invalid_argument("no such kernel");
}

}  // namespace

// False, with a message, if the launch failed.
extern "C" bool shim_launch(const char* kernel, unsigned blocks, unsigned threads, std::size_t shared_bytes,
                            const void* arguments, std::size_t size, int order, char* message,
                            std::size_t message_size) {
    try {
        cuda_shim::launch(entry_of(kernel, size).kernel, arguments, blocks, threads, shared_bytes,
                          static_cast<cuda_shim::Order>(order));
        return true;
    } catch (const std::exception& error) {
        std::snprintf(message, message_size, "%s", error.what());
        return false;
    }
}

extern "C" int shim_kernel_count() { return static_cast<int>(std::size(entries)); }
extern "C" const char* shim_kernel_name(int index) { return entries[index].name; }
