"""The CUDA kernels: one source, compiled by nvcc (`native`) or at run time by NVRTC (`nvrtc`).

In: pointers to device memory. Out: heatmaps and overlays on the device. `interface` is what engines call, `launches`
decides grids and arguments. Imports `kernels.boundary` and `errors`.
"""
