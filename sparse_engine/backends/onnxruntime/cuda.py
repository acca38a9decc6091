"""ONNX Runtime on a GPU: the plain fallback there, its kernels dense.

The session works on our stream and reads and writes our buffers through IO binding, so that the trajectory stays on the
GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx

from sparse_engine import arguments
from sparse_engine.artifact import EngineFile
from sparse_engine.backends.attention import fuse_attention
from sparse_engine.backends.base import (
    GRAPH_FILE,
    BuildOptions,
    Payload,
    StepGraph,
    bytes_payload,
    weights_payload,
)
from sparse_engine.backends.cuda.device import OUTPUTS, Buffer, CudaDevice, Recording, tensors
from sparse_engine.backends.cuda.runtime import Cuda, find_gpu
from sparse_engine.backends.step_device import CaptureError, OutOfDeviceMemoryError, StepBuffers
from sparse_engine.errors import BackendError, UnsupportedError

from .attention import runtime_nodes
from .library import load_onnxruntime
from .session import Prepared, create_session, weights_in_place

if TYPE_CHECKING:
    from sparse_engine.backends.cuda.runner import CudaRunner

PROVIDER = "CUDAExecutionProvider"
OUT_OF_MEMORY = ("Failed to allocate memory", "out of memory")
PRECISIONS = ("fp32", "fp16")
DENSE = {"chosen": False, "kernel": "dense", "why": "ONNX Runtime has no sparse kernels on a GPU"}


def on_gpu(device: str | None) -> bool:
    """Whether a device is a GPU: "cuda", "cuda:1"."""
    return device is not None and device.partition(":")[0] == "cuda"


def check_cuda(options: BuildOptions) -> None:
    """See ``Backend.check``, for a GPU. Raises UnsupportedError."""
    if options.precision not in PRECISIONS:
        raise UnsupportedError(
            f"precision {options.precision!r} is not supported by the onnxruntime backend on a GPU; "
            f"expected {', '.join(PRECISIONS)}"
        )
    if options.require_sparse:
        raise UnsupportedError(f"--require-sparse: {DENSE['why']}", "use --backend tensorrt or torch")
    _check_provider()


def _check_provider() -> None:
    onnxruntime = load_onnxruntime()

    if PROVIDER not in onnxruntime.get_available_providers():
        raise UnsupportedError(
            f"the onnxruntime {onnxruntime.__version__} that is installed has no {PROVIDER}",
            "pip uninstall -y onnxruntime, then pip install 'sparse-engine[cuda]': the two packages share a folder",
        )


def build_cuda(graph: StepGraph) -> Payload:
    """Store the graph as it is."""
    files = [bytes_payload(GRAPH_FILE, graph.proto.SerializeToString()), weights_payload(graph.weights)]
    opset = next(entry.version for entry in graph.proto.opset_import if entry.domain == "")
    backend = {"name": "onnxruntime", "opset": opset, "device": "cuda"}
    return Payload(files, backend, dict.fromkeys(graph.layers, DENSE))


def load_cuda(engine: EngineFile, device: str, threads: int | None) -> CudaRunner:
    """Create a session on a GPU; ``threads`` is how many callers run at once.

    Raises:
        UnsupportedError: no CUDA provider, no GPU, or an engine that was built for the CPU.
        BackendError: ONNX Runtime refuses the engine.
    """
    from sparse_engine.backends.cuda.runner import CudaRunner

    if engine.manifest.backend["device"] != "cuda":
        raise UnsupportedError(
            f"device {device!r}: {engine.path} was built for the CPU, its weights packed for our own kernels",
            "build it with --device cuda",
        )
    callers = arguments.threads(threads) or 1
    _check_provider()
    gpu = find_gpu(device)
    lanes: list[Any] = []
    try:
        for _ in range(callers):
            lanes.append(SessionDevice(Cuda(gpu.index), gpu.index, engine))  # noqa: PERF401 - those made so far are closed
    except BackendError:
        for lane in lanes:
            lane.close()
        raise
    description = {
        "library": f"onnxruntime {engine.manifest.backend['version']}",
        "device": f"cuda:{gpu.index} {gpu.name}",
        "threads": callers,
    }
    return CudaRunner(lanes, (1, engine.manifest.batch[1], sys.maxsize), description)


class SessionDevice(CudaDevice):
    """A ``StepDevice`` that runs a session.

    Args:
        cuda: the GPU.
        index: its number.
        engine: built for a GPU.
    """

    memory, provider = "cuda", PROVIDER  # as ONNX Runtime calls them

    def __init__(self, cuda: Cuda, index: int, engine: EngineFile) -> None:
        onnxruntime = load_onnxruntime()

        super().__init__(cuda, index)
        prepared = Prepared(onnx.load_model_from_string(engine.read(GRAPH_FILE)))
        weights_in_place(prepared.model, engine)
        fuse_attention(prepared.model, runtime_nodes)
        try:
            self._session: Any = create_session(prepared, engine.path, None, providers=self._providers(engine))
        except Exception as error:  # ONNX Runtime's own exceptions have no common public base
            self.close()
            engine.verify()
            raise BackendError(f"{engine.path}: ONNX Runtime {onnxruntime.__version__} refuses it: {error}") from error
        if self.provider not in self._session.get_providers():  # ONNX Runtime falls back to the CPU and only prints it
            self.close()
            raise UnsupportedError(
                f"ONNX Runtime {onnxruntime.__version__} cannot start its {self.provider}",
                "install the CUDA and cuDNN that it was built for: pip install 'onnxruntime-gpu[cuda,cudnn]'",
            )
        self._names = {entry.name for entry in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def _providers(self, engine: EngineFile) -> list[Any]:
        settings = {
            "device_id": str(self._index),
            "user_compute_stream": str(self._cuda.stream_address(self._stream)),
            "use_tf32": str(int(engine.manifest.precision != "fp32")),
        }
        return [(PROVIDER, settings), "CPUExecutionProvider"]

    def step(self, buffers: StepBuffers[Buffer]) -> None:
        """See ``StepDevice``."""
        binding = self._session.io_binding()
        for name, buffer in tensors(buffers).items():
            if name in self._names:
                bind = binding.bind_output if name in OUTPUTS else binding.bind_input
                bind(name, self.memory, self._index, buffer.dtype, buffer.shape, buffer.address)
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as error:  # as above
            if any(words in str(error) for words in OUT_OF_MEMORY):
                raise OutOfDeviceMemoryError(f"ONNX Runtime has no memory for a step: {error}") from error
            raise BackendError(f"ONNX Runtime could not run a step: {error}") from error

    def capture(self, work: Callable[[], None]) -> Recording:
        """ONNX Runtime allocates while it runs, which cannot be recorded."""
        raise CaptureError("ONNX Runtime's steps are not recorded")

    def _release(self) -> None:
        self._session = None
