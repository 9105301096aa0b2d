"""The CUDA kernels: one source, compiled by nvcc (`native`) or at run time by NVRTC (`nvrtc`).

In: pointers to device memory. Out: heatmaps and overlays on the device. Engines call `interface`; `launches` chooses
grids and arguments. Imports `kernels.boundary` and `errors`.
"""
