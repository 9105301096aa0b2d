"""Pictures in and out.

In: paths, PIL images and arrays. Out: uint8 RGB, the network's input batch, colour maps, encoded files.
Imports `kernels` and the ground (`errors`, `files`, `preprocessing`).
"""
