// Compiled once for each part of the kernels: CAM_PART chooses it, FASTCAM_TABLE names the function that lists it.
#include "cam_cuda.hpp"

#include "cam_kernels.cuh"

#define CAM_ENTRY(kernel, Call, blocks, ...) {#kernel, sizeof(Call), reinterpret_cast<const void*>(&kernel)},

fastcam::CudaKernels fastcam::FASTCAM_TABLE() {
    static const CudaKernel kernels[] = {CAM_FOR_EACH_KERNEL(CAM_ENTRY)};
    return {kernels, sizeof(kernels) / sizeof(kernels[0])};
}
