"""PyTorch as a ``StepDevice``: tensors on one stream, and CUDA graphs of several steps."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_engine.backends.cuda.dlpack import CPU, CUDA
from sparse_engine.backends.cuda.dlpack_in import DeviceArray
from sparse_engine.backends.step_device import CaptureError, OutOfDeviceMemoryError, StepBuffers
from sparse_engine.errors import BackendError, EngineClosedError, SparseEngineError

from .fused import RECOMPILE_LIMIT
from .noise import draw_noise
from .plain import plain_torch
from .products import first_line

log = logging.getLogger(__name__)

_DTYPES = {np.float32: torch.float32, np.int64: torch.int64, np.uint32: torch.uint32}
_NUMPY = {theirs: ours for ours, theirs in _DTYPES.items()}


class TorchDevice:
    """A CUDA device, or the CPU, where nothing is compiled or recorded.

    Args:
        device: with its index where it is CUDA.
        step: a module that is one solver step, on the device.
        compiled: hand the step to torch.compile.
        beside: another of the same GPU that never runs at the same time: both use one stream, and one pool of memory
            for recordings, which PyTorch shares among those of one stream alone.
    """

    def __init__(
        self, device: torch.device, step: nn.Module, compiled: bool, beside: TorchDevice | None = None
    ) -> None:
        self._device = device
        self._step: Callable[..., None] | None = _writing(step)
        self._compiled = torch.compile(self._step, dynamic=False) if compiled else None
        self._compiler = "torch.compile" if compiled else "none"
        self._compiled_for: set[Hashable] = set()
        cuda = device.type == "cuda"
        self._stream: Any = None
        self._pool: Any = None  # for all recordings, which run one at a time and leave nothing in it
        if beside is not None:
            self._stream, self._pool = beside._stream, beside._pool
        elif cuda:
            self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which has moved the weights
        self._recording = False
        self._thread = threading.local()
        self.dlpack_device = (CUDA if cuda else CPU, device.index or 0)

    def allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Tensor:
        """See ``StepDevice.allocate``."""
        with self._current():
            return torch.empty(shape, dtype=_DTYPES[dtype], device=self._device)  # type: ignore[index]

    def free(self, buffer: Tensor) -> None:
        """Nothing: a tensor's memory goes with its last reference."""

    def row(self, buffer: Tensor, index: int) -> Tensor:
        """See ``StepDevice.row``."""
        return buffer[index]

    def upload(self, buffer: Tensor, array: np.ndarray) -> None:
        """See ``StepDevice.upload``; by way of pinned memory, which PyTorch keeps until the copy is done."""
        with self._current():
            staged = torch.from_numpy(array if array.flags.writeable else array.copy())
            if self._stream is not None:
                staged = staged.pin_memory()
            buffer[: len(array)].copy_(staged, non_blocking=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See ``StepDevice.copy``."""
        with self._current():
            target.copy_(source)

    def download(self, buffer: Tensor) -> np.ndarray:
        """See ``StepDevice.download``. Into NumPy's own memory: a thread may give that back at any time (ending.py)."""
        with self._current():
            array = np.empty(tuple(buffer.shape), _NUMPY[buffer.dtype])
            torch.from_numpy(array).copy_(buffer)
            return array

    def share(self, buffer: Tensor) -> Tensor:
        """See ``StepDevice.share``.

        The memory is of the stream that is current where this is called, so that it goes back to the stream on which
        the copy is used: on ours it would be handed out again while work of the caller's still reads it.
        """
        with self._errors():
            shared = torch.empty_like(buffer)
            if self._stream is not None:  # what the caller has enqueued may still use that memory
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self.copy(shared, buffer)
        self.synchronize()  # whatever stream it is used on, it is there
        return shared

    def take(self, buffer: Tensor, array: DeviceArray) -> None:
        """See ``TakingDevice.take``."""
        with self._current():
            source = torch.from_dlpack(array.owner)  # has our stream wait for the owner's
            for at, first, count in array.runs():
                buffer[at : at + count].copy_(source[first : first + count])
        self.synchronize()

    def ready_noise(self) -> None:
        """See ``NoiseDevice.ready_noise``: PyTorch's operators are always there."""

    def draw(self, z: Tensor, origin: Tensor, draw: Tensor) -> None:
        """See ``NoiseDevice.draw``."""
        with self._current():
            draw_noise(z, origin, draw)

    def step(self, buffers: StepBuffers[Tensor]) -> None:
        """See ``StepDevice.step``. Where torch.compile fails the step runs as PyTorch's own operators from then on."""
        arguments = vars(buffers)
        with plain_torch(), self._current():
            if self._compiled is not None:
                try:
                    with self._compiling(buffers):
                        self._compiled(**arguments)
                    return
                except Exception as error:  # compilers raise anything
                    if self._recording or isinstance(error, torch.OutOfMemoryError):
                        raise
                    self._compiled, self._compiler = None, f"none: {first_line(error)}"
                    log.warning("torch.compile failed, the network runs uncompiled: %s", first_line(error))
            if self._step is None:
                raise EngineClosedError("the engine is closed", "load it again with SparseEngine.load")
            self._step(**arguments)

    def capture(self, work: Callable[[], None]) -> _CudaGraph:
        """See ``StepDevice.capture``."""
        if self._stream is None:
            raise CaptureError("no CUDA graphs on the CPU")
        self._ready_thread()
        graph, self._recording = torch.cuda.CUDAGraph(), True
        try:
            with (
                plain_torch(),
                self._current(),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                work()
        except Exception as error:  # whatever cannot be recorded: the loop then enqueues step by step
            self._pool = torch.cuda.graph_pool_handle()  # PyTorch may not have closed one that a recording failed in
            raise CaptureError(first_line(error)) from error
        finally:
            self._recording = False
        return _CudaGraph(graph, self._current)

    def synchronize(self) -> None:
        """See ``StepDevice.synchronize``."""
        with self._current():
            if self._stream is not None:
                self._stream.synchronize()

    def describe(self) -> dict[str, Any]:
        """What compiles the step; where that has failed, why."""
        return {"compiler": self._compiler}

    def close(self) -> None:
        """Let go of the network. A second call does nothing."""
        self._step = self._compiled = None

    @contextlib.contextmanager
    def _compiling(self, buffers: StepBuffers[Tensor]) -> Iterator[None]:
        """Let PyTorch compile for a batch that has not come before; raising its limit takes 0.1 ms, so only then."""
        key = (buffers.x.shape, buffers.guidance.shape)
        if key in self._compiled_for:
            yield
            return
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            yield
        self._compiled_for.add(key)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Make the stream PyTorch's current one, and its errors ours."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self._device))
                stack.enter_context(torch.cuda.stream(self._stream))
            stack.enter_context(self._errors())
            yield

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Make PyTorch's errors ours."""
        try:
            yield
        except (SparseEngineError, CaptureError):
            raise
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemoryError(
                f"{self._device} has no memory left for this batch", "sample with a smaller batch_size"
            ) from error
        except RuntimeError as error:
            raise BackendError(f"{self._device} failed: {first_line(error)}") from error

    def _ready_thread(self) -> None:
        """cuBLAS and cuSPARSELt keep a handle for each thread, and cannot make one while a graph is being recorded."""
        if getattr(self._thread, "ready", False):
            return
        with self._current():
            identity = torch.eye(64, dtype=torch.float16, device=self._device)  # which is 2:4
            identity @ identity
            if torch.backends.cusparselt.is_available() and torch.cuda.get_device_capability(self._device) >= (8, 0):
                torch._cslt_compress(identity)
        self.synchronize()
        self._thread.ready = True


class _CudaGraph:
    """A ``Recording``."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, current: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self._graph, self._current = graph, current

    def launch(self) -> None:
        """See ``Recording.launch``."""
        with self._current():
            self._graph.replay()

    def release(self) -> None:
        """See ``Recording.release``."""
        with contextlib.suppress(BackendError), self._current():
            self._graph.reset()


def _writing(step: nn.Module) -> Callable[..., None]:
    """A step that writes into the buffers it is given."""

    def write(
        x: Tensor,
        t: Tensor,
        conditioning: dict[str, Tensor],
        guidance: Tensor,
        coef: Tensor,
        clip: Tensor,
        base: Tensor,
        h1: Tensor,
        h2: Tensor,
        z: Tensor,
        x_next: Tensor,
        m: Tensor,
    ) -> None:
        told = (conditioning, guidance) if conditioning else ()
        following, prediction = step(x, t, *told, coef, clip, base, h1, h2, z)
        x_next.copy_(following)
        m.copy_(prediction)

    return write
