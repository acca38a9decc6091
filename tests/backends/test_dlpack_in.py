"""Arrays of other libraries on their way in: stand-ins for torch, CuPy and JAX with nothing but the protocol."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from sparse_engine.backends.cuda import runtime
from sparse_engine.backends.cuda.dlpack import CPU, CUDA, SharedArray
from sparse_engine.backends.cuda.dlpack_in import DeviceArray, receive
from sparse_engine.errors import OptionError, UnsupportedError
from tests.backends.fake_cuda import FakeCuda

X = np.arange(24, dtype=np.float32).reshape(4, 2, 3)


class Array:
    """An array on a device that is made up; its memory is the host's.

    Args:
        device: (DLDeviceType, number).
        copies: it knows DLPack 1.0's ``dl_device``.
    """

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (CUDA, 0), copies: bool = False) -> None:
        self.array, self.device, self.copies = array, device, copies
        self.asked: list[dict[str, Any]] = []
        self.given_back = 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> Any:
        if "dl_device" in options and not self.copies:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'dl_device'")
        self.asked.append(options)
        device = options.get("dl_device", self.device)

        def release() -> None:
            self.given_back += 1

        return SharedArray(
            self.array.ctypes.data, self.array.shape, self.array.dtype.type, device, release
        ).__dlpack__()


class Strided(Array):
    """As torch exports a transposed tensor."""

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__()


def test_an_array_of_the_host_is_shared() -> None:
    owner = Array(X, (CPU, 0))
    found = receive("noise", owner, None)
    assert isinstance(found, np.ndarray)
    assert np.shares_memory(found, X)
    halves = receive("noise", Array(X.astype(np.float16), (CPU, 0)), (CUDA, 0))
    assert halves.dtype == np.float16


def test_torch_tensors_of_the_host() -> None:
    import torch

    assert np.array_equal(receive("x", torch.from_numpy(X), None), X)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="x cannot be read through DLPack: .*BFloat16"):
        receive("x", torch.zeros(2, dtype=torch.bfloat16), None)
    with pytest.raises(OptionError, match=r"x cannot be read .* requires grad"):
        receive("x", torch.zeros(2, requires_grad=True), None)


def test_an_array_of_the_engines_gpu_stays_and_is_lent_to_its_stream() -> None:
    owner = Array(X)
    found = receive("noise", owner, (CUDA, 0))
    assert isinstance(found, DeviceArray)
    assert found.shape == X.shape
    assert owner.given_back == 1  # what its shape was read off
    with found.lent(77) as address:
        assert address == X.ctypes.data
        gc.collect()
        assert owner.given_back == 1
    assert owner.given_back == 2
    assert owner.asked == [{"stream": 1}, {"stream": 77}]


def test_rows_are_stretches_of_the_owners() -> None:
    array = receive("noise", Array(X), (CUDA, 0))
    assert isinstance(array, DeviceArray)
    assert array.runs() == [(0, 0, 4)]
    assert array[1:3].runs() == [(0, 1, 2)]
    filled = array[np.array([1, 2, 3])][np.array([0, 1, 2, 2, 2])]
    assert (filled.shape, len(filled)) == ((5, 2, 3), 5)
    assert filled.runs() == [(0, 1, 3), (3, 3, 1), (4, 3, 1)]


@pytest.mark.parametrize("stays", [None, (CUDA, 1)])
def test_another_gpus_array_is_copied_to_the_host_by_its_own_library(stays: Any) -> None:
    owner = Array(X, copies=True)
    found = receive("noise", owner, stays)
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, X)
    assert owner.asked[-1] == {"dl_device": (CPU, 0), "copy": True}


class Ignoring(Array):
    """Takes any option, and hands out memory of the GPU all the same, as our own samples do."""

    def __dlpack__(self, **options: Any) -> Any:
        return super().__dlpack__(**{key: value for key, value in options.items() if key == "stream"})


@pytest.mark.parametrize("kind", [Array, Ignoring])
def test_what_its_library_does_not_copy_the_cuda_runtime_does(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(runtime, "Cuda", lambda index: cuda)
    owner = kind(X)
    found = receive("noise", owner, None)
    assert np.array_equal(found, X)  # type: ignore[arg-type]
    assert owner.asked[-1] == {"stream": 2}  # of its own
    gc.collect()
    assert owner.given_back == len(owner.asked)
    assert cuda.leaks() == {}


def test_without_cuda_python_either_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(index: int) -> None:
        raise UnsupportedError("cuda-python is not there")

    monkeypatch.setattr(runtime, "Cuda", missing)
    with pytest.raises(OptionError, match=r"noise lies on cuda:3, and its library cannot .*\n.*as a NumPy array"):
        receive("noise", Array(X, (CUDA, 3)), None)


@pytest.mark.parametrize(
    "owner,message",
    [
        (Array(X.astype(np.float16)), "x is float16 on cuda:0; expected float32"),
        (Array(X.astype(np.int64), (CUDA, 2)), "x is int64 on cuda:2; expected float32"),
        (Strided(X.transpose(0, 2, 1)), "x on cuda:0 is not contiguous in memory"),
        (Array(np.array(1, np.float32)), "x on cuda:0 is a single number"),
        (Array(X, (8, 0)), "x lies on a device of DLPack's type 8\n.*of the host or of an NVIDIA GPU"),
    ],
)
def test_what_cannot_be_taken(owner: Array, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        receive("x", owner, (CUDA, 0))


def test_contiguous_strides_are_taken_and_those_of_single_rows_do_not_count() -> None:
    assert isinstance(receive("x", Strided(X), (CUDA, 0)), DeviceArray)
    assert isinstance(receive("x", Strided(X[::4]), (CUDA, 0)), DeviceArray)  # one row, of whatever stride


def test_a_library_that_refuses_is_quoted() -> None:
    class Refusing(Array):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("can't export what requires a gradient")

    with pytest.raises(OptionError, match="x cannot be read through DLPack: can't export what requires a gradient"):
        receive("x", Refusing(X), (CUDA, 0))

    class Newer(Array):
        def __dlpack__(self, **options: Any) -> Any:
            return X.__dlpack__(max_version=(1, 0))

    with pytest.raises(OptionError, match="its capsule is of another version"):
        receive("x", Newer(X), (CUDA, 0))
