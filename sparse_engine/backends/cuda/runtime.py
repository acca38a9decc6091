"""The part of the CUDA runtime that the backends use, over cuda-python; every call's error code is checked.

Addresses are plain integers. ``Cuda`` holds no state but the device it was made for, so a test replaces it by memory of
the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_engine.backends.step_device import CaptureError, OutOfDeviceMemoryError
from sparse_engine.errors import BackendError, OptionError, UnsupportedError

from .nvrtc import compile_cubin


@dataclass(frozen=True)
class Gpu:
    """A GPU: its number, name, compute capability ("8.6") and bytes of memory; and the driver's CUDA version."""

    index: int
    name: str
    compute_capability: str
    memory: int
    driver: str


def find_gpu(device: str | None = None) -> Gpu:
    """The GPU of a device name ("cuda", "cuda:1"; None is the first).

    Raises:
        OptionError: no such device.
        UnsupportedError: no driver, a driver too old, or no GPU.
    """
    runtime = _runtime()
    index = _index(device)
    (error, driver), (code, count) = runtime.cudaDriverGetVersion(), runtime.cudaGetDeviceCount()
    codes = runtime.cudaError_t
    if error != codes.cudaSuccess or not driver:
        raise UnsupportedError("there is no NVIDIA driver", "install NVIDIA's driver, or choose another backend")
    if code == codes.cudaErrorInsufficientDriver:
        _, wanted = runtime.cudaRuntimeGetVersion()
        raise UnsupportedError(
            f"the NVIDIA driver is for CUDA {_version(driver)}; this cuda-python is for CUDA {_version(wanted)}",
            f"update the driver, or pip install 'cuda-python=={driver // 1000}.*'",
        )
    if code != codes.cudaSuccess or not count:
        raise UnsupportedError("there is a driver, but no NVIDIA GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    if index >= count:
        raise OptionError(f"device cuda:{index}: there are {count} GPUs", f"expected cuda:0 to cuda:{count - 1}")
    error, found = runtime.cudaGetDeviceProperties(index)
    _check(runtime, error, "cudaGetDeviceProperties")
    name = found.name.decode(errors="replace").rstrip("\0")
    return Gpu(index, name, f"{found.major}.{found.minor}", int(found.totalGlobalMem), _version(driver))


def _runtime() -> Any:
    """``cuda.bindings.runtime``. Raises UnsupportedError where cuda-python is not there."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise UnsupportedError(f"cuda-python is not there: {error}", "pip install 'cuda-python>=12.8'") from error
    return runtime


def _index(device: str | None) -> int:
    kind, colon, number = (device or "cuda").partition(":")
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise OptionError(f"device {device!r}: this engine runs on a GPU", "expected cuda, or cuda:1")
    return int(number or 0)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _check(runtime: Any, code: Any, call: str) -> None:
    """Raise OutOfDeviceMemoryError or BackendError where a call failed."""
    codes = runtime.cudaError_t
    if code == codes.cudaSuccess:
        return
    _, text = runtime.cudaGetErrorString(code)
    what = f"{call} failed: {text.decode(errors='replace')} (error {int(code)})"
    if code == codes.cudaErrorMemoryAllocation:
        raise OutOfDeviceMemoryError(f"the GPU is out of memory: {what}", "use a smaller batch, or free the GPU")
    raise BackendError(what, "check nvidia-smi; after a fault the process has to be started again")


@dataclass(frozen=True)
class Kernel:
    """A function on the GPU, and the module that holds it."""

    module: Any
    function: Any


class Cuda:
    """Memory, streams, events, graphs and kernels of one GPU. Each thread that uses it calls ``use`` first."""

    def __init__(self, index: int) -> None:
        self._runtime = _runtime()
        self._device = index

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *results = getattr(self._runtime, name)(*arguments)
        _check(self._runtime, code, name)
        return results[0] if results else None

    def use(self) -> None:
        """Make this GPU the calling thread's."""
        self._call("cudaSetDevice", self._device)

    def allocate(self, nbytes: int) -> int:
        """Device memory; OutOfDeviceMemoryError where there is not enough."""
        try:
            return int(self._call("cudaMalloc", nbytes))
        except OutOfDeviceMemoryError:
            self._runtime.cudaGetLastError()  # it would be reported again by the next launch
            raise

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call("cudaFree", address)

    def allocate_pinned(self, nbytes: int) -> int:
        """Host memory that the GPU copies from without the processor."""
        return int(self._call("cudaHostAlloc", nbytes, 0))

    def free_pinned(self, address: int) -> None:
        """Give pinned memory back."""
        self._call("cudaFreeHost", address)

    def write_host(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to pinned memory."""
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Enqueue a copy; each end is memory of the GPU or of the host."""
        self._call("cudaMemcpyAsync", target, source, nbytes, self._runtime.cudaMemcpyKind.cudaMemcpyDefault, stream)

    def create_stream(self) -> Any:
        """A stream that does not wait for the default stream."""
        return self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    def stream_address(self, stream: Any) -> int:
        """A stream's handle as TensorRT takes it."""
        return int(stream)

    def synchronize(self, stream: Any) -> None:
        """Wait until a stream has done everything."""
        self._call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: Any) -> None:
        """Give a stream back."""
        self._call("cudaStreamDestroy", stream)

    def record_event(self, stream: Any) -> Any:
        """An event that is done when all that the stream holds now is done."""
        event = self._call("cudaEventCreateWithFlags", self._runtime.cudaEventDisableTiming)
        self._call("cudaEventRecord", event, stream)
        return event

    def is_done(self, event: Any) -> bool:
        """Whether an event has come."""
        (code,) = self._runtime.cudaEventQuery(event)
        if code == self._runtime.cudaError_t.cudaErrorNotReady:
            return False
        _check(self._runtime, code, "cudaEventQuery")
        return True

    def wait(self, event: Any) -> None:
        """Wait for an event."""
        self._call("cudaEventSynchronize", event)

    def destroy_event(self, event: Any) -> None:
        """Give an event back."""
        self._call("cudaEventDestroy", event)

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """Record what ``work`` enqueues as a graph that can be launched. Raises CaptureError."""
        runtime = self._runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        failure: BackendError | None = None
        try:
            work()
        except BackendError as error:
            failure = error
        finally:
            code, graph = runtime.cudaStreamEndCapture(stream)
        if failure is not None or code != runtime.cudaError_t.cudaSuccess:
            runtime.cudaGetLastError()
            if code == runtime.cudaError_t.cudaSuccess and graph is not None:
                runtime.cudaGraphDestroy(graph)
            raise CaptureError(failure.what if failure is not None else f"cudaStreamEndCapture: error {int(code)}")
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        except OutOfDeviceMemoryError:
            raise
        except BackendError as error:
            raise CaptureError(error.what) from error
        finally:
            runtime.cudaGraphDestroy(graph)

    def launch(self, graph: Any, stream: Any) -> None:
        """Enqueue a recorded graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Give a recorded graph back."""
        self._call("cudaGraphExecDestroy", graph)

    def compile(self, source: str, name: str) -> Kernel:
        """A kernel of a program in CUDA C++, for this GPU. Raises UnsupportedError where NVRTC does not make it."""
        attributes = self._runtime.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, self._device)
        minor = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, self._device)
        module = _call_driver("cuModuleLoadData", compile_cubin(source, f"{major}{minor}"))
        return Kernel(module, _call_driver("cuModuleGetFunction", module, name.encode()))

    def launch_kernel(
        self, kernel: Kernel, blocks: int, threads: int, arguments: Sequence[tuple[int, Any]], stream: Any
    ) -> None:
        """Enqueue a kernel on a row of blocks; its arguments are (value, ctypes type), copied before this returns."""
        values, types = zip(*arguments, strict=True)
        shape = (blocks, 1, 1, threads, 1, 1)
        _call_driver("cuLaunchKernel", kernel.function, *shape, 0, int(stream), (values, types), 0)

    def unload(self, kernel: Kernel) -> None:
        """Give a kernel back."""
        _call_driver("cuModuleUnload", kernel.module)


def _call_driver(name: str, *arguments: Any) -> Any:
    """A call of the driver's own interface, where alone kernels are loaded from memory and launched by handle."""
    from cuda.bindings import driver

    code, *results = getattr(driver, name)(*arguments)
    if code != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(code)
        reason = text.decode(errors="replace") if text else "unknown"
        raise BackendError(f"{name} failed: {reason} (error {int(code)})", "check nvidia-smi, and update the driver")
    return results[0] if results else None
