"""What passes between export, backends and the engine: the step graph, the payload, the step runner."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sparse_engine.artifact import EngineFile, PayloadFile

from .options import BuildOptions

if TYPE_CHECKING:
    from onnx import ModelProto

    from sparse_engine.sampling import Trajectory

WEIGHTS_FILE = "weights.bin"
GRAPH_FILE = "step.onnx"
WEIGHTS_ALIGNMENT = 4096  # a page: each large tensor can be mapped by itself
IDENTITY_ROW = np.array([0, 1, 1, 0, 0, 0, 0, 0], np.float32)  # of coef: m = the network's output
NO_CLIP = np.array([-np.inf, np.inf], np.float32)
BUILT_DENSE = "the engine was built without --sparse"
NoiseSource = Callable[[int], np.ndarray]
StepCallback = Callable[[int, float, np.ndarray], object]


@dataclass(frozen=True)
class LazyArray:
    """An array that is made when it is read, and not kept: ``numpy.asarray`` makes it.

    Attributes:
        shape, dtype: of the array.
        make: makes it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.make(), dtype)


Weights = Mapping[str, "np.ndarray | LazyArray"]


@dataclass(frozen=True)
class StepGraph:
    """One solver step as ONNX, its weights beside it.

    Attributes:
        proto: the graph. Weights are references into ``weights.bin``, laid out in the order of ``weights``.
        weights: initializer name -> array.
        layers: layer name -> (initializer, reduction axis): where each Linear's and Conv's weight is in the graph.
        state: the baked weights as float32 under the checkpoint's own keys, for a backend that rebuilds the network.
    """

    proto: ModelProto
    weights: dict[str, np.ndarray]
    layers: dict[str, tuple[str, int]]
    state: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Payload:
    """What a backend's build leaves: files, and what the manifest says of them."""

    files: Sequence[PayloadFile]
    backend: dict[str, Any]
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Availability:
    """Whether this machine can run a backend, with what, and if not, why not and what to do.

    ``builds`` is set where it cannot run here, but can build engines for other machines; ``automatic`` is not where it
    runs here, but only by name, since another backend is faster.
    """

    usable: bool
    version: str | None = None
    reason: str | None = None
    fix: str | None = None
    builds: bool = False
    automatic: bool = True


class StepRunner(Protocol):
    """A loaded engine: walks trajectories. Safe to call from several threads."""

    def run(
        self,
        trajectory: Trajectory,
        x: np.ndarray,
        *,
        conditioning: Mapping[str, np.ndarray],
        guidance: np.ndarray,
        noise: NoiseSource,
        callback: StepCallback | None = None,
        callback_every: int = 1,
        on_device: bool = False,
    ) -> Any:
        """Run every row of a trajectory.

        Args:
            trajectory: the sampler's table.
            x: float32 [B, C, H, W], the state at the first time.
            conditioning: name -> [G, B, *shape], what the network is told beside x and t.
            guidance: float32 [G], the weight of each of the G network passes.
            noise: draw index -> float32 of x's shape; asked only where a row adds noise.
            callback: called with (step, time, x) after each step; returning False stops.
            callback_every: so many steps may pass between two of its calls; the last step has one.
            on_device: leave the result where it was made.

        Returns:
            float32 [B, C, H, W] after the last row: a NumPy array, or, with ``on_device``, an object with
            ``__dlpack__`` in the device's memory.
        """
        ...

    def network(
        self, x: np.ndarray, t: np.ndarray, *, conditioning: Mapping[str, np.ndarray], guidance: np.ndarray
    ) -> np.ndarray:
        """The network's own output: x float32 [B, C, H, W], t float32 [B] in its own units -> float32 [B, C, H, W]."""
        ...

    def describe(self) -> dict[str, Any]:
        """What runs: library version, device, threads, and per layer the kernel where it was chosen."""
        ...

    def close(self) -> None:
        """Give memory and devices back. A second call does nothing."""
        ...


class Backend(Protocol):
    """One way of building and running an engine. ``name`` is the one in manifests and ``--backend``."""

    name: str

    def availability(self) -> Availability:
        """Whether this machine can run it."""
        ...

    def check(self, options: BuildOptions) -> None:
        """Say before the work, not after it, that these options cannot be built here. Raises UnsupportedError."""
        ...

    def graph_precision(self, options: BuildOptions) -> str:
        """The precision that the step graph has to be exported in: one that ``export.precision`` lowers to."""
        ...

    def build(self, graph: StepGraph, options: BuildOptions, sparse_layers: list[str]) -> Payload:
        """Turn a step graph into an engine's files.

        ``sparse_layers`` are those whose weights were found 2:4 in the graph itself; none for a dense build.
        Raises BackendError, UnsupportedError.
        """
        ...

    def load(self, engine: EngineFile, *, threads: int | None, device: str | None, autotune: bool) -> StepRunner:
        """Load an engine's payload, choosing kernels by timing them or by a stated rule.

        Raises EngineFileError, BackendError, UnsupportedError.
        """
        ...


def weight_offsets(weights: Weights) -> tuple[dict[str, int], int]:
    """Where each weight lies in ``weights.bin``, and the file's size."""
    offsets, end = {}, 0
    for name, array in weights.items():
        alignment = WEIGHTS_ALIGNMENT if array.nbytes >= WEIGHTS_ALIGNMENT else 64
        offsets[name] = -(-end // alignment) * alignment
        end = offsets[name] + array.nbytes
    return offsets, end


def weights_payload(weights: Weights, name: str = WEIGHTS_FILE) -> PayloadFile:
    """``weights.bin``, or weights of another name, as a payload file."""
    offsets, size = weight_offsets(weights)

    def chunks() -> Iterable[bytes | memoryview]:
        position = 0
        for name, array in weights.items():
            yield bytes(offsets[name] - position)
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data  # bytes of any type, bf16 too
            position = offsets[name] + array.nbytes

    return PayloadFile(name, size, chunks, aligned=True)


def bytes_payload(name: str, data: bytes) -> PayloadFile:
    """A small file as a payload file."""
    return PayloadFile(name, len(data), lambda: (data,))


def with_kernel(layer: Mapping[str, Any], kernel: Mapping[str, Any], sparse: bool) -> dict[str, Any]:
    """A layer's report with what runs it.

    Where a masked layer stays dense for a reason of its own, or of the build's, that is "why", whatever the backend
    would have said of a dense layer.

    Args:
        layer: as in the manifest.
        kernel: what a backend or a runner says: "chosen", "kernel", "why".
        sparse: whether the engine was built with ``--sparse``.
    """
    report = {**layer, **kernel}
    if layer.get("masked") and not layer.get("hardware_24"):
        report["why"] = layer.get("reason")
    elif layer.get("masked") and not sparse:
        report["why"] = BUILT_DENSE
    return report
