"""A GPU as the trajectory loop's device: buffers, staging, CUDA graphs; a backend adds the step."""

from __future__ import annotations

import abc
import collections
import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine.backends.step_device import StepBuffers
from sparse_engine.errors import BackendError

from .dlpack import CUDA, SharedArray
from .dlpack_in import DeviceArray
from .runtime import Cuda, Kernel

STAGING_BYTES = 256 << 20  # pinned memory that uploads may hold at once; beyond it they wait for the GPU
NOISE_SOURCE, NOISE_THREADS = Path(__file__).with_name("noise.cu"), 256  # threads of a block
OUTPUTS = ("x_next", "m")
_TENSORS = ("x", "t", "coef", "clip", "base", "h1", "h2", "z", *OUTPUTS)


@dataclass(frozen=True)
class Buffer:
    """Device memory that holds an array."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


class Staging:
    """Pinned host memory that uploads pass through, so that the caller's array is free at once.

    Blocks are powers of two in size; one is used again when the copy out of it is done.
    """

    def __init__(self, cuda: Cuda, stream: Any, limit: int = STAGING_BYTES) -> None:
        self._cuda, self._stream, self._limit = cuda, stream, limit
        self._free: dict[int, list[int]] = collections.defaultdict(list)
        self._busy: collections.deque[tuple[Any, int, int]] = (
            collections.deque()
        )  # (event, size, address), oldest first
        self._held = 0

    def upload(self, target: int, array: np.ndarray) -> None:
        """Enqueue a copy of a contiguous array to device memory."""
        size = 1 << max(array.nbytes - 1, 1).bit_length()
        address = self._take(size)
        self._cuda.write_host(address, array)
        self._cuda.copy(target, address, array.nbytes, self._stream)
        self._busy.append((self._cuda.record_event(self._stream), size, address))

    def _take(self, size: int) -> int:
        while self._busy and self._cuda.is_done(self._busy[0][0]):
            self._retire()
        while not self._free[size] and self._busy and self._held + size > self._limit:
            self._cuda.wait(self._busy[0][0])
            self._retire()
        if self._free[size]:
            return self._free[size].pop()
        self._held += size
        return self._cuda.allocate_pinned(size)

    def _retire(self) -> None:
        event, size, address = self._busy.popleft()
        self._cuda.destroy_event(event)
        self._free[size].append(address)

    def close(self) -> None:
        """Give everything back; the stream has been waited for."""
        while self._busy:
            self._retire()
        for addresses in self._free.values():
            for address in addresses:
                self._cuda.free_pinned(address)
        self._free.clear()


class Recording:
    """A CUDA graph of some steps; it keeps alive what its kernels use."""

    def __init__(self, cuda: Cuda, graph: Any, stream: Any, kept: tuple[Any, ...]) -> None:
        self._cuda, self._graph, self._stream, self._kept = cuda, graph, stream, kept

    def launch(self) -> None:
        """See ``device_loop.Recording``."""
        self._cuda.use()
        self._cuda.launch(self._graph, self._stream)

    def release(self) -> None:
        """See ``device_loop.Recording``."""
        self._cuda.destroy_graph(self._graph)


class CudaDevice(abc.ABC):
    """A ``StepDevice`` over one stream of a GPU, but for the step. One thread at a time uses it: see ``DeviceLoop``.

    Args:
        cuda: the GPU.
        index: its number, for DLPack.
    """

    def __init__(self, cuda: Cuda, index: int) -> None:
        cuda.use()
        self._cuda, self._index = cuda, index
        self._stream = cuda.create_stream()
        self._staging = Staging(cuda, self._stream)
        self._noise: Kernel | None = None
        self.dlpack_device = (CUDA, index)

    def allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Buffer:
        """See ``StepDevice``."""
        self._cuda.use()
        size = math.prod(shape) * np.dtype(dtype).itemsize
        return Buffer(self._cuda.allocate(max(size, 1)), shape, np.dtype(dtype))

    def free(self, buffer: Buffer) -> None:
        """See ``StepDevice``."""
        self._cuda.use()
        self._cuda.free(buffer.address)

    def row(self, buffer: Buffer, index: int) -> Buffer:
        """See ``StepDevice``."""
        row = Buffer(buffer.address, buffer.shape[1:], buffer.dtype)
        return Buffer(buffer.address + index * row.nbytes, row.shape, row.dtype)

    def upload(self, buffer: Buffer, array: np.ndarray) -> None:
        """See ``StepDevice``."""
        self._cuda.use()
        if array.dtype != buffer.dtype or array.nbytes > buffer.nbytes:
            raise BackendError(
                f"{array.dtype} {list(array.shape)} does not fit a buffer of {buffer.dtype} {list(buffer.shape)}"
            )
        self._staging.upload(buffer.address, np.ascontiguousarray(array))

    def take(self, buffer: Buffer, array: DeviceArray) -> None:
        """See ``TakingDevice``."""
        self._cuda.use()
        row = buffer.nbytes // buffer.shape[0]
        with array.lent(self._cuda.stream_address(self._stream)) as address:
            for at, first, count in array.runs():
                self._cuda.copy(buffer.address + at * row, address + first * row, count * row, self._stream)
            self._cuda.synchronize(self._stream)

    def copy(self, target: Buffer, source: Buffer) -> None:
        """See ``StepDevice``."""
        self._cuda.copy(target.address, source.address, source.nbytes, self._stream)

    def download(self, buffer: Buffer) -> np.ndarray:
        """See ``StepDevice``."""
        self._cuda.use()
        array = np.empty(buffer.shape, buffer.dtype)
        self._cuda.copy(array.ctypes.data, buffer.address, buffer.nbytes, self._stream)
        self._cuda.synchronize(self._stream)
        return array

    def share(self, buffer: Buffer) -> SharedArray:
        """See ``StepDevice``."""
        cuda = self._cuda
        copy = self.allocate(buffer.shape, buffer.dtype.type)
        self.copy(copy, buffer)
        self.synchronize()

        def release() -> None:
            cuda.use()
            cuda.free(copy.address)

        return SharedArray(copy.address, copy.shape, copy.dtype.type, (CUDA, self._index), release)

    def ready_noise(self) -> None:
        """See ``NoiseDevice``."""
        if self._noise is None:
            self._cuda.use()
            self._noise = self._cuda.compile(NOISE_SOURCE.read_text(), "normal")

    def draw(self, z: Buffer, origin: Buffer, draw: Buffer) -> None:
        """See ``NoiseDevice``."""
        if self._noise is None:
            raise BackendError("the noise kernel is drawn from before it is compiled")
        images, elements = z.shape[0], math.prod(z.shape[1:])
        blocks = -(-images * -(-elements // 4) // NOISE_THREADS)
        pointers = [(each.address, ctypes.c_void_p) for each in (z, origin, draw)]
        sizes = [(each, ctypes.c_uint) for each in (elements, images)]
        self._cuda.launch_kernel(self._noise, blocks, NOISE_THREADS, [*pointers, *sizes], self._stream)

    @abc.abstractmethod
    def step(self, buffers: StepBuffers[Buffer]) -> None:
        """See ``StepDevice``."""

    def capture(self, work: Callable[[], None]) -> Recording:
        """See ``StepDevice``."""
        self._cuda.use()
        graph = self._cuda.capture(self._stream, work)
        return Recording(self._cuda, graph, self._stream, self._in_use())

    def synchronize(self) -> None:
        """See ``StepDevice``."""
        self._cuda.use()
        self._cuda.synchronize(self._stream)

    def close(self) -> None:
        """Give memory and the stream back; a second call does nothing."""
        if self._stream is None:
            return
        self._cuda.use()
        try:
            self._cuda.synchronize(self._stream)
        finally:
            self._staging.close()
            self._release()
            if self._noise is not None:
                self._cuda.unload(self._noise)
            self._cuda.destroy_stream(self._stream)
            self._stream = None

    def _in_use(self) -> tuple[Any, ...]:
        """What a recording has to keep alive."""
        return ()

    def _release(self) -> None:  # noqa: B027 - a backend may have added nothing
        """Give back what a backend has added."""


def tensors(buffers: StepBuffers[Buffer]) -> dict[str, Buffer]:
    """The step graph's name of each buffer."""
    named = {name: getattr(buffers, name) for name in _TENSORS}
    return named | {**buffers.conditioning, "guidance": buffers.guidance} if buffers.conditioning else named
