"""From an exported file and pictures to scores and heatmaps.

In: an explained `.onnx` file, pictures or batches, targets. Out: an `Explanation`. `explainer` checks the call,
`targets` and `methods` interpret the request, an engine of `engines` runs the session and the kernels on the CPU or a
device of `devices`, and `explanation` holds the results. `convolutions` replaces layers of a file that
fastcam's own CPU kernels compute faster. `inspection` and `tensorrt` describe and prepare files.
Imports `kernels`, `pictures` and the ground; never `exporting`, and not `onnx` at import.
"""
