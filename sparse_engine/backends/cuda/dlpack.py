"""Device memory as an object with ``__dlpack__``: torch, CuPy and JAX take it over without a copy.

The structures are those of DLPack 0.8 (https://dmlc.github.io/dlpack), which every consumer still takes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

CPU, CUDA = 1, 2  # DLDeviceType
_KINDS = {"i": 0, "u": 1, "f": 2}  # DLDataTypeCode


class Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("kind", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    """DLManagedTensor."""


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(Managed))
Managed._fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, _Destructor)
is_named = ctypes.pythonapi.PyCapsule_IsValid
is_named.restype, is_named.argtypes = ctypes.c_int, (ctypes.c_void_p, ctypes.c_char_p)
pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p)
UNUSED = b"dltensor"  # a consumer renames the capsule when it takes it
_alive: dict[
    int, tuple[Managed, Any, Any]
] = {}  # address of the structure -> what it points to, until it is given back


class SharedArray:
    """A contiguous array in memory that it owns; the consumer of ``__dlpack__`` shares it.

    Args:
        address: of the first element.
        shape, dtype: of the array.
        device: (DLDeviceType, number), (CUDA, 0) for the first GPU.
        release: gives the memory back, called once, when neither this nor a consumer needs it.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: type[np.generic],
        device: tuple[int, int],
        release: Callable[[], None],
    ) -> None:
        self._address, self.shape, self.dtype = address, shape, np.dtype(dtype)
        self._device, self._release = device, release

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        """A capsule for the consumer. The data is complete: no stream has to wait for another."""
        shape = (ctypes.c_int64 * len(self.shape))(*self.shape)
        managed = Managed()
        managed.tensor = Tensor(
            data=self._address,
            device_type=self._device[0],
            device_id=self._device[1],
            ndim=len(self.shape),
            kind=_KINDS[self.dtype.kind],
            bits=8 * self.dtype.itemsize,
            lanes=1,
            shape=ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)),
        )
        managed.deleter = _forget
        address = ctypes.addressof(managed)
        _alive[address] = (managed, shape, self)
        return _new_capsule(address, UNUSED, _drop_capsule)

    def __del__(self) -> None:
        self._release()


@_Deleter
def _forget(managed: Any) -> None:
    """Called by the consumer when it is done."""
    _alive.pop(ctypes.addressof(managed.contents), None)


@_Destructor
def _drop_capsule(capsule: int) -> None:
    """Called when a capsule goes; what no consumer took goes with it."""
    if is_named(capsule, UNUSED):
        _alive.pop(pointer_of(capsule, UNUSED), None)
