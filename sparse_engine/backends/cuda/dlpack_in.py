"""Arrays of other libraries, by way of ``__dlpack__``: on the host, or where they lie on a GPU.

The protocol is the Python array API's: https://data-apis.org/array-api/latest/design_topics/data_interchange.html.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from sparse_engine.errors import OptionError, UnsupportedError

from .dlpack import CPU, CUDA, UNUSED, Managed, is_named, pointer_of

HOSTS = (CPU, 3, 11, 13)  # DLDeviceType: also pinned memory of CUDA and ROCm, and CUDA's managed memory
DEFAULT_STREAM = 1  # CUDA's legacy one: not every library knows -1, and nothing is read on it
FLOAT32 = (2, 32, 1)  # DLDataTypeCode, bits, lanes
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_REFUSALS = (AttributeError, AssertionError, BufferError, RuntimeError, TypeError, ValueError)  # of others' __dlpack__

Device = tuple[int, int]  # (DLDeviceType, number)


class DeviceArray:
    """Rows of a contiguous float32 array in a GPU's memory, which another library owns.

    Attributes:
        owner: the object with ``__dlpack__``.
        device: where it lies.
        rows: which of its rows these are, [B].
        shape: of these rows together, [B, ...].
    """

    def __init__(self, owner: Any, device: Device, rows: np.ndarray, row_shape: tuple[int, ...]) -> None:
        self.owner, self.device, self.rows = owner, device, rows
        self.shape = (len(rows), *row_shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | np.ndarray) -> DeviceArray:
        return DeviceArray(self.owner, self.device, self.rows[index], self.shape[1:])

    def runs(self) -> list[tuple[int, int, int]]:
        """(first of these rows, the owner's row that it is, how many follow on from there) of each stretch of rows."""
        starts = [0, *(np.flatnonzero(np.diff(self.rows) != 1) + 1).tolist()]
        return [(a, int(self.rows[a]), b - a) for a, b in zip(starts, [*starts[1:], len(self)], strict=True)]

    @contextlib.contextmanager
    def lent(self, stream: int) -> Iterator[int]:
        """The address of the owner's row 0, for this block; what is enqueued on ``stream`` finds the data complete."""
        with _capsule(self.owner, stream=stream) as tensor:
            yield (tensor.data or 0) + tensor.byte_offset


def receive(name: str, value: Any, stays: Device | None) -> np.ndarray | DeviceArray:
    """An object with ``__dlpack__`` as an array of the host; not copied off the device that ``stays`` names.

    Args:
        name: of the argument, for errors.
        value: any library's array. On the host, of any type that NumPy has; on a GPU, float32 and contiguous.
        stays: the device whose arrays may stay where they are.

    Raises:
        OptionError: it cannot be read, or is of another type or on another kind of device; says which.
    """
    try:
        kind, number = (int(each) for each in value.__dlpack_device__())
        if kind in HOSTS:
            return np.asarray(value) if hasattr(value, "__array__") else np.from_dlpack(value)
        if kind != CUDA:
            raise OptionError(
                f"{name} lies on a device of DLPack's type {kind}", "pass an array of the host or of an NVIDIA GPU"
            )
        array = _on_gpu(name, value, (kind, number))
        return array if array.device == stays else _on_host(name, array)
    except _REFUSALS as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{name} cannot be read through DLPack: {error}", "pass it as a NumPy array") from error


def _on_gpu(name: str, value: Any, device: Device) -> DeviceArray:
    with _capsule(value, stream=DEFAULT_STREAM) as tensor:
        shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
        found = (tensor.kind, tensor.bits, tensor.lanes)
        if found != FLOAT32:
            kind = f"{_KINDS.get(found[0], 'unknown')}{found[1]}" + (f"x{found[2]}" if found[2] != 1 else "")
            raise OptionError(f"{name} is {kind} on cuda:{device[1]}; expected float32", "convert it on the GPU")
        if not shape:
            raise OptionError(f"{name} on cuda:{device[1]} is a single number; expected one row for each sample")
        if tensor.strides and not _is_contiguous(shape, tensor.strides[: len(shape)]):
            raise OptionError(f"{name} on cuda:{device[1]} is not contiguous in memory", "pass a contiguous copy")
    return DeviceArray(value, device, np.arange(shape[0]), shape[1:])


def _is_contiguous(shape: tuple[int, ...], strides: list[int]) -> bool:
    expected = np.cumprod([1, *reversed(shape[1:])])[::-1]
    return all(a == b or length <= 1 for a, b, length in zip(strides, expected.tolist(), shape, strict=True))


def _on_host(name: str, array: DeviceArray) -> np.ndarray:
    """A copy by the owner's library, or, where that cannot make one, by the CUDA runtime."""
    with contextlib.suppress(*_REFUSALS):  # libraries from before DLPack 1.0 do not know ``dl_device``, or ignore it
        capsule = array.owner.__dlpack__(dl_device=(CPU, 0), copy=True)
        if is_named(id(capsule), UNUSED) and _tensor_of(capsule).device_type == CPU:
            return np.from_dlpack(_Carrier(capsule))
    from .runtime import Cuda

    try:
        cuda = Cuda(array.device[1])
    except UnsupportedError as error:
        raise OptionError(
            f"{name} lies on cuda:{array.device[1]}, and its library cannot copy it to the host",
            "pass it as a NumPy array, or pip install cuda-python",
        ) from error
    cuda.use()
    found, stream = np.empty(array.shape, np.float32), cuda.create_stream()
    try:
        with array.lent(cuda.stream_address(stream)) as address:
            cuda.copy(found.ctypes.data, address, found.nbytes, stream)
            cuda.synchronize(stream)
    finally:
        cuda.destroy_stream(stream)
    return found


class _Carrier:
    """A capsule of the host's memory, as NumPy asks for one."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack_device__(self) -> Device:
        return CPU, 0

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule


@contextlib.contextmanager
def _capsule(owner: Any, stream: int) -> Iterator[Any]:
    """What a capsule describes. It is never taken over, so that it gives the memory back when it goes."""
    capsule = owner.__dlpack__(stream=stream)
    if not is_named(id(capsule), UNUSED):
        raise BufferError("its capsule is of another version than was asked for")
    yield _tensor_of(capsule)
    del capsule


def _tensor_of(capsule: Any) -> Any:
    return ctypes.cast(pointer_of(id(capsule), UNUSED), ctypes.POINTER(Managed)).contents.tensor
