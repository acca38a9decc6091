"""ONNX Runtime on the CPU: the portable default, with our own kernels for the layers that are 2:4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_engine import kernels
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
from sparse_engine.errors import OptionError, UnsupportedError

if TYPE_CHECKING:
    from .runner import OnnxRuntimeRunner

PRECISIONS = ("fp32", "bf16")


class OnnxRuntimeBackend:
    """Builds and runs step graphs with ONNX Runtime's CPU provider."""

    name = "onnxruntime"

    def availability(self) -> Availability:
        """Whether the onnxruntime package is there."""
        try:
            import onnxruntime
        except ImportError as error:
            return Availability(False, reason=str(error), fix="pip install 'sparse-engine[cpu]'")
        return Availability(True, version=onnxruntime.__version__)

    def check(self, options: BuildOptions) -> None:
        """See ``Backend.check``."""
        if options.precision not in PRECISIONS:
            raise UnsupportedError(
                f"precision {options.precision!r} is not supported by the onnxruntime backend; "
                f"expected {', '.join(PRECISIONS)}",
            )
        if options.precision == "bf16" and not options.sparse:
            raise UnsupportedError(
                "precision bf16 on the CPU is that of the sparse kernels; ONNX Runtime has no dense bf16 product there",
                "build with --sparse, or in fp32",
            )
        if kernels.is_available():
            kernels.best_tier(options.precision)  # type: ignore[arg-type]  # raises where this machine has none

    def build(self, graph: StepGraph, options: BuildOptions, sparse_layers: list[str]) -> Payload:
        """Store the graph, its 2:4 layers packed; which kernel each gets is decided where the engine is loaded."""
        from .layers import compress

        linear = [name for name in sparse_layers if graph.layers[name][1] == 0]
        if linear:
            graph = compress(graph, linear)
        files = [bytes_payload(GRAPH_FILE, graph.proto.SerializeToString()), weights_payload(graph.weights)]
        opset = next(entry.version for entry in graph.proto.opset_import if entry.domain == "")
        packed = {"chosen": None, "kernel": "chosen where it is loaded"}
        dense = {"chosen": False, "kernel": "dense"}
        layers = {name: packed if name in linear else dense for name in graph.layers}
        return Payload(files, {"name": self.name, "opset": opset, "device": "cpu"}, layers)

    def load(self, engine: EngineFile, *, threads: int | None, device: str | None, autotune: bool) -> OnnxRuntimeRunner:
        """Create a session over weights that stay mapped in the engine file."""
        from .runner import OnnxRuntimeRunner

        if device not in (None, "cpu"):
            raise UnsupportedError(f"device {device!r}: the onnxruntime backend runs on cpu")
        if threads is not None and threads < 1:
            raise OptionError(f"threads = {threads}; expected 1 or more, or None for one per core")
        return OnnxRuntimeRunner(engine, threads, autotune)
