"""Single convolution layers: ours against ONNX Runtime's, same threads, interleaved.

    python -m bench.convolution build/ctest/bench_convolution [--threads 2] [--repeats 5] [--only TEXT]

The executable is built with ``-DFASTCAM_BUILD_TESTS=ON``. Prints a table: milliseconds (medians), GFLOP/s counted as
direct convolution does, and the ratio of the times.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OPSET = 17


@dataclass(frozen=True)
class Layer:
    """One layer with a square input, a square kernel and "same" padding."""

    network: str
    size: int
    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    residual: bool = False
    pool: bool = False
    channels_first: bool = False

    @property
    def name(self) -> str:
        fusions = " + residual" * self.residual + " + pool" * self.pool
        stride = f" / {self.stride}" if self.stride > 1 else ""
        return f"{self.network}: {self.inputs} > {self.outputs} at {self.size}, {self.kernel}x{self.kernel}{stride}{fusions}"

    @property
    def output_size(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    def flops(self, batch: int) -> int:
        return 2 * batch * self.output_size**2 * self.inputs * self.outputs * self.kernel**2


LAYERS = [
    Layer("VGG16", 224, 3, 64, channels_first=True),
    Layer("VGG16", 224, 64, 64),
    Layer("VGG16", 224, 64, 64, pool=True),
    Layer("VGG16", 112, 64, 128),
    Layer("VGG16", 112, 128, 128, pool=True),
    Layer("VGG16", 56, 128, 256),
    Layer("VGG16", 56, 256, 256),
    Layer("VGG16", 28, 256, 512),
    Layer("VGG16", 28, 512, 512),
    Layer("VGG16", 14, 512, 512),
    Layer("ResNet50", 224, 3, 64, kernel=7, stride=2, channels_first=True),
    Layer("ResNet50", 56, 64, 64, kernel=1),
    Layer("ResNet50", 56, 64, 64),
    Layer("ResNet50", 56, 64, 256, kernel=1, residual=True),
    Layer("ResNet50", 56, 256, 64, kernel=1),
    Layer("ResNet50", 56, 256, 128, kernel=1, stride=2),
    Layer("ResNet50", 28, 128, 128),
    Layer("ResNet50", 28, 512, 128, kernel=1),
    Layer("ResNet50", 28, 128, 512, kernel=1, residual=True),
    Layer("ResNet50", 14, 256, 256),
    Layer("ResNet50", 14, 1024, 256, kernel=1),
    Layer("ResNet50", 14, 256, 1024, kernel=1, residual=True),
    Layer("ResNet50", 7, 512, 512),
    Layer("ResNet50", 7, 2048, 512, kernel=1),
    Layer("ResNet50", 7, 512, 2048, kernel=1, residual=True),
]


def onnxruntime_layer(layer: Layer, batch: int, threads: int) -> Callable[[], float]:
    """Return a function that runs ONNX Runtime's fused layer once and returns its time in seconds.

    The convolution stands between two 1x1 convolutions of one channel, as inside of a network, so that no change of
    layout is timed; theirs is subtracted by profiling the single node.
    """
    random = np.random.default_rng(0)
    deviation = np.sqrt(2 / (layer.inputs * layer.kernel**2))
    shape = (layer.outputs, layer.inputs, layer.kernel, layer.kernel)
    weights = (random.standard_normal(shape) * deviation).astype(np.float32)
    bias = random.standard_normal(layer.outputs).astype(np.float32)
    pads = [layer.kernel // 2] * 4
    nodes = [
        helper.make_node(
            "Conv", ["x", "w", "b"], ["c"], kernel_shape=[layer.kernel] * 2, pads=pads, strides=[layer.stride] * 2
        )
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, layer.inputs, layer.size, layer.size])]
    feed = {"x": random.standard_normal((batch, layer.inputs, layer.size, layer.size)).astype(np.float32)}
    last = "c"
    if layer.residual:
        size = [batch, layer.outputs, layer.output_size, layer.output_size]
        inputs.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, size))
        feed["r"] = random.standard_normal(size).astype(np.float32)
        nodes.append(helper.make_node("Add", ["c", "r"], ["s"]))
        last = "s"
    nodes.append(helper.make_node("Relu", [last], ["y"]))
    last = "y"
    if layer.pool:
        nodes.append(helper.make_node("MaxPool", ["y"], ["p"], kernel_shape=[2, 2], strides=[2, 2]))
        last = "p"
    graph = helper.make_graph(
        nodes,
        "layer",
        inputs,
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run() -> float:
        start = time.perf_counter()
        session.run(None, feed)
        return time.perf_counter() - start

    run()
    return run


class Bench:
    """Our layers, in a child process that answers line by line."""

    def __init__(self, executable: Path, threads: int, instruction_set: str, algorithm: str) -> None:
        self._process = subprocess.Popen([executable], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._threads, self._instruction_set, self._algorithm = threads, instruction_set, algorithm

    def times(self, layer: Layer, batch: int, runs: int) -> tuple[str, list[float]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        fields = (batch, layer.size, layer.size, layer.inputs, layer.outputs, layer.kernel, layer.stride,
                  int(layer.channels_first), int(layer.residual), int(layer.pool), self._threads,
                  self._instruction_set, self._algorithm, runs)  # fmt: skip
        print(*fields, file=self._process.stdin, flush=True)
        algorithm, *times = self._process.stdout.readline().split()
        return algorithm, [float(seconds) for seconds in times]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("executable", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--runs", type=int, default=6, help="per repeat")
    parser.add_argument("--instruction-set", default="avx512")
    parser.add_argument("--algorithm", default="auto")
    parser.add_argument("--only", default="", help="layers whose name contains this")
    parser.add_argument("--ours", action="store_true", help="don't run ONNX Runtime")
    options = parser.parse_args(arguments)
    bench = Bench(options.executable, options.threads, options.instruction_set, options.algorithm)
    print(
        f"{'layer':52} {'algorithm':13} {'median':>8} {'best':>8} {'GFLOP/s':>7} "
        f"{'theirs':>8} {'best':>8} {'ratio':>6} {'best':>6}"
    )
    for layer in LAYERS:
        if options.only not in layer.name:
            continue
        peer = None if options.ours else onnxruntime_layer(layer, options.batch, options.threads)
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(options.repeats):
            algorithm, times = bench.times(layer, options.batch, options.runs)
            ours += times
            if peer is not None:
                time.sleep(0.02)  # the threads of the other side spin for a while
                theirs += [peer() for _ in range(options.runs)]
                time.sleep(0.02)
        mine, best = statistics.median(ours), min(ours)
        line = f"{layer.name:52} {algorithm:13} {mine * 1e3:8.3f} {best * 1e3:8.3f} {layer.flops(options.batch) / best / 1e9:7.0f}"
        if theirs:
            other = statistics.median(theirs)
            line += f" {other * 1e3:8.3f} {min(theirs) * 1e3:8.3f} {mine / other:6.2f} {best / min(theirs):6.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
