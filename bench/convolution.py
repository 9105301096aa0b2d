"""Single convolution layers: ours against ONNX Runtime's, same threads, interleaved.

    python -m bench.convolution build/ctest/bench_convolution [--threads 2] [--repeats 5] [--only TEXT]

The executable is built with ``-DFASTCAM_BUILD_TESTS=ON``. Prints a table: milliseconds, GFLOP/s counted for
direct convolution, and the ratio of the times. With one thread, processor time is measured, which other programs affect
less.
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
EXTRA = 2
"""Number of copies of the layer; the difference of two models gives its time without the layout changes."""
SETTLING = 0.02
"""Seconds after which the other side's threads have stopped spinning."""


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
        """Network, channels, size, kernel and fusions."""
        fusions = " + residual" * self.residual + " + pool" * self.pool
        stride = f" / {self.stride}" if self.stride > 1 else ""
        shape = f"{self.inputs} > {self.outputs} at {self.size}, {self.kernel}x{self.kernel}"
        return f"{self.network}: {shape}{stride}{fusions}"

    @property
    def output_size(self) -> int:
        """Rows of the output."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    def flops(self, batch: int) -> int:
        """Return the operations of a direct convolution."""
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


def onnxruntime_layers(layer: Layer, batch: int, threads: int, copies: int) -> Callable[[], float]:
    """Return a function that runs ``copies`` of the layer once, in ONNX Runtime, and returns the seconds.

    The copies have one input and different weights; a global average follows each of them, so that no large result
    changes its layout. A residual sum is omitted.
    """
    random = np.random.default_rng(0)
    deviation = np.sqrt(2 / (layer.inputs * layer.kernel**2))
    shape = (layer.outputs, layer.inputs, layer.kernel, layer.kernel)
    nodes, weights = [], []
    for copy in range(copies):
        weight = (random.standard_normal(shape, np.float32) * np.float32(deviation)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{copy}"))
        weights.append(numpy_helper.from_array(random.standard_normal(layer.outputs, np.float32), f"b{copy}"))
        size, stride, pads = [layer.kernel] * 2, [layer.stride] * 2, [layer.kernel // 2] * 4
        operands = f"x w{copy} b{copy}".split()
        nodes.append(helper.make_node("Conv", operands, [f"c{copy}"], kernel_shape=size, strides=stride, pads=pads))
        nodes.append(helper.make_node("Relu", [f"c{copy}"], [f"r{copy}"]))
        if layer.pool:
            nodes.append(helper.make_node("MaxPool", [f"r{copy}"], [f"p{copy}"], kernel_shape=[2, 2], strides=[2, 2]))
        nodes.append(helper.make_node("GlobalAveragePool", [f"{'p' if layer.pool else 'r'}{copy}"], [f"y{copy}"]))
    extents = [batch, layer.inputs, layer.size, layer.size]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, extents)]
    outputs = [helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, None) for copy in range(copies)]
    graph = helper.make_graph(nodes, "layer", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": random.standard_normal(extents, np.float32)}
    clock = time.thread_time if threads == 1 else time.perf_counter

    def run() -> float:
        start = clock()
        session.run(None, feed)
        return clock() - start

    run()
    return run


class Bench:
    """Our layers, in a child process that answers line by line."""

    def __init__(self, executable: Path, threads: int, instruction_set: str, algorithm: str) -> None:
        self._process = subprocess.Popen([executable], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._threads, self._instruction_set, self._algorithm = threads, instruction_set, algorithm

    def times(self, layer: Layer, batch: int, runs: int) -> tuple[str, list[float]]:
        """Return the chosen algorithm and the seconds of each run."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
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
    part = f" {'ms':>8} {'GF/s':>5}" + ("" if options.ours else f" {'ORT ms':>8} {'ratio':>5}")
    print(f"{'layer':52} {'algorithm':13}{part}   and the same for the fastest runs")
    for layer in LAYERS:
        if options.only not in layer.name:
            continue
        counts = () if options.ours else (1, 1 + EXTRA)
        peers = [onnxruntime_layers(layer, options.batch, options.threads, copies) for copies in counts]
        ours: list[float] = []
        theirs: list[list[float]] = [[] for _ in peers]
        for _ in range(options.repeats):
            algorithm, times = bench.times(layer, options.batch, options.runs)
            ours += times
            for peer, seconds in zip(peers, theirs, strict=True):
                time.sleep(SETTLING)
                seconds += [peer() for _ in range(options.runs)]
            time.sleep(SETTLING)
        line = f"{layer.name:52} {algorithm:13}"
        for summary in (statistics.median, min):
            mine = summary(ours)
            line += f" {mine * 1e3:8.3f} {layer.flops(options.batch) / mine / 1e9:5.0f}"
            if theirs:
                other = (summary(theirs[1]) - summary(theirs[0])) / EXTRA
                line += f" {other * 1e3:8.3f} {mine / other:5.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
