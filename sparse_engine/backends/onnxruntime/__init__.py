"""ONNX Runtime: the portable default, on the CPU with our own kernels for the layers that are 2:4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_engine import arguments, kernels
from sparse_engine.artifact import EngineFile
from sparse_engine.backends.base import (
    GRAPH_FILE,
    Availability,
    BuildOptions,
    Payload,
    StepGraph,
    bytes_payload,
    weights_payload,
)
from sparse_engine.cores import pool_size, say_if_capped
from sparse_engine.errors import OptionError, UnsupportedError

from .compute import products_in
from .cuda import build_cuda, check_cuda, load_cuda, on_gpu
from .library import load_onnxruntime

if TYPE_CHECKING:
    from sparse_engine.backends.base import StepRunner

PRECISIONS = ("fp32", "bf16", "int8")
CONV_IS_DENSE = "a convolution in int8 whose weights are not 2:4, which ONNX Runtime has kernels for alone"
FEWEST_BF16_WEIGHTS = 1 << 16  # of a dense layer: a smaller one (the last, say) gains nothing and stays float32


class OnnxRuntimeBackend:
    """Builds and runs step graphs with ONNX Runtime's CPU provider, or, densely, its CUDA provider."""

    name = "onnxruntime"

    def availability(self) -> Availability:
        """Whether the onnxruntime package is there."""
        try:
            onnxruntime = load_onnxruntime()
        except ImportError as error:
            return Availability(False, reason=str(error), fix="pip install 'sparse-engine[cpu]'")
        return Availability(True, version=onnxruntime.__version__)

    def check(self, options: BuildOptions) -> None:
        """See ``Backend.check``."""
        if on_gpu(options.device):
            check_cuda(options)
            return
        if options.device not in (None, "cpu"):
            raise OptionError(f"device {options.device!r}: the onnxruntime backend runs on cpu and cuda")
        if options.precision not in PRECISIONS:
            raise UnsupportedError(
                f"precision {options.precision!r} is not supported by the onnxruntime backend; "
                f"expected {', '.join(PRECISIONS)}",
            )
        if kernels.is_available():
            kernels.best_tier(products_in(options.precision))  # raises where this machine has none

    def graph_precision(self, options: BuildOptions) -> str:
        """On a GPU that of the build; on the CPU float32 for our own kernels, which round to bf16 themselves."""
        return options.precision if on_gpu(options.device) else "fp32"

    def build(self, graph: StepGraph, options: BuildOptions, sparse_layers: list[str]) -> Payload:
        """Store the graph, its 2:4 layers packed; which kernel each gets is decided where the engine is loaded.

        Of layers in int8 the codes are packed, and nothing else is changed.
        """
        from .compress import compress, compress_codes, why_no_kernel, why_not_packed

        if on_gpu(options.device):
            return build_cuda(graph)
        quantised = {name for name, (weight, _) in graph.layers.items() if graph.weights[weight].dtype == np.int8}
        obstacles = {name: why_no_kernel(graph, name) for name in sparse_layers if name not in quantised}
        ours = [name for name, why in obstacles.items() if why is None]
        others = [name for name in graph.layers if name not in ours and _worth_bf16(graph, name)]
        others = others if options.precision == "bf16" else []
        proto, weights = compress(graph, ours, others) if ours or others else (graph.proto, graph.weights)
        unpacked = {name: why_not_packed(graph, name) for name in sparse_layers if name in quantised}
        packed = [name for name, why in unpacked.items() if why is None]
        if packed:
            proto, weights = compress_codes(graph, proto, weights, packed)
        files = [bytes_payload(GRAPH_FILE, proto.SerializeToString()), weights_payload(weights)]
        opset = next(entry.version for entry in graph.proto.opset_import if entry.domain == "")
        later = "chosen where it is loaded"
        layers: dict[str, dict[str, Any]] = {name: {"chosen": False, "kernel": "dense"} for name in graph.layers}
        layers |= {name: {"chosen": False, "kernel": "dense", "why": why} for name, why in obstacles.items() if why}
        layers |= {name: {"chosen": False, "kernel": later} for name in quantised}
        convolutions = [name for name in quantised if graph.weights[graph.layers[name][0]].ndim != 2]
        layers |= {
            name: {"chosen": False, "kernel": "dense int8", "why": unpacked.get(name) or CONV_IS_DENSE}
            for name in convolutions
        }
        layers |= {name: {"chosen": None, "kernel": later} for name in packed}
        layers |= {name: {"chosen": False, "kernel": later} for name in others}
        layers |= {name: {"chosen": None, "kernel": later} for name in ours}
        return Payload(files, {"name": self.name, "opset": opset, "device": "cpu"}, layers)

    def load(self, engine: EngineFile, *, threads: int | None, device: str | None, autotune: bool) -> StepRunner:
        """Create a session over weights that stay mapped in the engine file."""
        from .runner import OnnxRuntimeRunner

        built_for = engine.manifest.backend.get("device")
        runs_on = device or built_for
        if runs_on is not None and on_gpu(runs_on):
            return load_cuda(engine, runs_on, threads)
        if device not in (None, "cpu") or built_for != "cpu":
            raise UnsupportedError(
                f"device {device!r}: {engine.path} was built for onnxruntime on {built_for}",
                f"leave the device out, or build it with --device {device}",
            )
        asked = arguments.threads(threads)
        say_if_capped(asked)
        return OnnxRuntimeRunner(engine, pool_size(asked), autotune)


def _worth_bf16(graph: StepGraph, layer: str) -> bool:
    """Whether a dense layer is a product that our bf16 kernel takes and that is worth it."""
    initializer, axis = graph.layers[layer]
    weight = graph.weights[initializer]
    return weight.ndim == 2 and axis == 0 and weight.shape[0] % 4 == 0 and weight.size >= FEWEST_BF16_WEIGHTS
