// The kernels of cam_kernels.cuh, compiled by nvcc: one table for each part of that file. No CUDA header.
#pragma once

#include <cstddef>

namespace fastcam {

struct CudaKernel {
    const char* name;
    std::size_t argument_size;
    const void* function;  // as cudaLaunchKernel takes it
};

struct CudaKernels {
    const CudaKernel* first;
    std::size_t count;
};

CudaKernels cuda_kernels_any();
CudaKernels cuda_kernels_float32();
CudaKernels cuda_kernels_float16();
CudaKernels cuda_kernels_bfloat16();

}  // namespace fastcam
