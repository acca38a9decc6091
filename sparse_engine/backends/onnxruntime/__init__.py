"""ONNX Runtime on the CPU: the portable default."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from sparse_engine.artifact import EngineFile
from sparse_engine.errors import BackendError, EngineClosedError, OptionError, UnsupportedError
from sparse_engine.sampling import Trajectory, walk

from .base import (
    GRAPH_FILE,
    WEIGHTS_FILE,
    Availability,
    BuildOptions,
    NoiseSource,
    Payload,
    StepCallback,
    StepGraph,
    bytes_payload,
    weights_payload,
)

log = logging.getLogger(__name__)

PRECISIONS = ("fp32",)
IDENTITY_ROW = np.array([0, 1, 1, 0, 0, 0, 0, 0], np.float32)  # m = the network's output
NO_CLIP = np.array([-np.inf, np.inf], np.float32)


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

    def build(self, graph: StepGraph, options: BuildOptions) -> Payload:
        """Store the graph and its weights as they are; ONNX Runtime optimises when it loads."""
        if options.precision not in PRECISIONS:
            raise UnsupportedError(
                f"precision {options.precision!r} is not supported by the onnxruntime backend; "
                f"expected {', '.join(PRECISIONS)}",
            )
        files = [bytes_payload(GRAPH_FILE, graph.proto.SerializeToString()), weights_payload(graph.weights)]
        opset = next(entry.version for entry in graph.proto.opset_import if entry.domain == "")
        kernel = {"chosen": False, "kernel": "onnxruntime dense"}
        return Payload(files, {"name": self.name, "opset": opset, "device": "cpu"}, dict.fromkeys(graph.layers, kernel))

    def load(self, engine: EngineFile, *, threads: int | None, device: str | None) -> OnnxRuntimeRunner:
        """Create a session over weights that stay mapped in the engine file."""
        if device not in (None, "cpu"):
            raise UnsupportedError(f"device {device!r}: the onnxruntime backend runs on cpu")
        if threads is not None and threads < 1:
            raise OptionError(f"threads = {threads}; expected 1 or more, or None for one per core")
        return OnnxRuntimeRunner(engine, threads)


class OnnxRuntimeRunner:
    """A session and the glue between it and the sampling loop. ``InferenceSession.run`` is thread-safe."""

    def __init__(self, engine: EngineFile, threads: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(engine.path.resolve().parent)
        )
        try:
            self._session: Any = onnxruntime.InferenceSession(
                _graph_over_mapped_weights(engine), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's own exceptions have no common public base
            raise BackendError(f"{engine.path}: ONNX Runtime {onnxruntime.__version__} refuses it: {error}") from error
        self._conditional = any(entry.name == "y" for entry in self._session.get_inputs())
        self._threads = threads
        self._version = onnxruntime.__version__

    def run(
        self,
        trajectory: Trajectory,
        x: np.ndarray,
        *,
        labels: np.ndarray | None,
        guidance: np.ndarray,
        noise: NoiseSource,
        callback: StepCallback | None = None,
    ) -> np.ndarray:
        """See ``StepRunner.run``."""
        return walk(trajectory, self._step(labels, guidance), x, noise=noise, callback=callback)

    def network(self, x: np.ndarray, t: np.ndarray, *, labels: np.ndarray | None, guidance: np.ndarray) -> np.ndarray:
        """See ``StepRunner.network``."""
        zeros = np.zeros_like(x)
        return self._step(labels, guidance)(x, t, IDENTITY_ROW, NO_CLIP, zeros, zeros, zeros, zeros)[1]

    def describe(self) -> dict[str, Any]:
        """See ``StepRunner.describe``."""
        return {"library": f"onnxruntime {self._version}", "device": "cpu", "threads": self._threads or "one per core"}

    def close(self) -> None:
        """Drop the session; calls under way finish on their own reference."""
        self._session = None

    def _step(self, labels: np.ndarray | None, guidance: np.ndarray) -> Any:
        """The step function that the loop calls, with what stays the same over a trajectory bound to it."""
        feed: dict[str, np.ndarray] = {"y": labels, "guidance": guidance} if self._conditional else {}  # type: ignore[dict-item]
        session = self._session
        if session is None:
            raise EngineClosedError("the engine was closed by another thread", "load it again with SparseEngine.load")

        def step(
            x: np.ndarray,
            t: np.ndarray,
            coef: np.ndarray,
            clip: np.ndarray,
            base: np.ndarray,
            h1: np.ndarray,
            h2: np.ndarray,
            z: np.ndarray,
        ) -> tuple[np.ndarray, np.ndarray]:
            moving = {"x": x, "t": t, "coef": coef, "clip": clip, "base": base, "h1": h1, "h2": h2, "z": z}
            x_next, m = session.run(("x_next", "m"), {**moving, **feed})
            return x_next, m

        return step


def _graph_over_mapped_weights(engine: EngineFile) -> bytes:
    """The graph with its weights' references turned to their place inside the engine file."""
    import onnx

    proto = onnx.load_model_from_string(engine.read(GRAPH_FILE))
    start, _ = engine.span(WEIGHTS_FILE)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = engine.path.resolve().name
            elif entry.key == "offset":
                entry.value = str(int(entry.value) + start)
    data: bytes = proto.SerializeToString()
    return data
