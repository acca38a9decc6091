"""The noise kernel: its source as a C++ compiler takes it, against the definition, and as NVRTC takes it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparse_engine.backends.cuda import nvrtc, runtime
from sparse_engine.backends.cuda.device import NOISE_SOURCE, NOISE_THREADS
from sparse_engine.errors import BackendError, UnsupportedError
from sparse_engine.sampling.noise import SeededNoise

SOURCE = NOISE_SOURCE.read_text()
# Every thread of every block, one after the other.
ON_HOST = """
#include <math.h>
#define __device__
#define __global__
static struct { unsigned x; } blockIdx, blockDim, threadIdx;
#include "noise.cu"
extern "C" void launch(float* z, const unsigned* origin, const unsigned* draw, unsigned elements, unsigned images,
                       unsigned blocks, unsigned threads) {
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) normal(z, origin, draw, elements, images);
}
"""
GUARD = 64  # floats behind z
Kernel = Callable[[SeededNoise, int], np.ndarray]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("noise")
    (folder / "on_host.cpp").write_text(ON_HOST)
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-fno-fast-math", "-shared", "-fPIC", f"-I{NOISE_SOURCE.parent}"]
    subprocess.run([compiler, *flags, folder / "on_host.cpp", "-o", folder / "noise.so"], check=True)
    launch = ctypes.CDLL(str(folder / "noise.so")).launch

    def draw(noise: SeededNoise, number: int) -> np.ndarray:
        images, elements = len(noise.images), int(np.prod(noise.shape))
        z = np.full(images * elements + GUARD, np.nan, np.float32)
        origin, word = noise.origin, np.array([number], np.uint32)
        pointers = [ctypes.c_void_p(each.ctypes.data) for each in (z, origin, word)]
        blocks = -(-images * -(-elements // 4) // NOISE_THREADS)
        launch(*pointers, *(ctypes.c_uint(each) for each in (elements, images, blocks, NOISE_THREADS)))
        assert np.isnan(z[-GUARD:]).all()
        return z[:-GUARD].reshape(images, *noise.shape)

    return draw


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 + 12345, 2**64 - 1, "each"])
@pytest.mark.parametrize(
    "images,shape",
    [
        ([0], (1,)),
        ([5, 2**32 - 1, 5], (3,)),
        ([2**31, 0], (5, 1, 1)),
        ([9, 8, 7, 6], (3, 7, 5)),
        (range(1000, 1016), (3, 32, 32)),
        (range(2), (4, 64, 64)),
    ],
    ids=str,
)
def test_draws_what_the_definition_says(kernel: Kernel, seed: Any, images: Any, shape: tuple[int, ...]) -> None:
    seeds = np.array([2**64 - 1 - 2**33 * i for i in range(len(images))], np.uint64) if seed == "each" else seed
    noise = SeededNoise(seeds, np.array(images), shape)
    for draw in (0, 1, 50, 2**32 - 1):
        found, expected = kernel(noise, draw), noise(draw)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-5


def test_the_tails_agree_too(kernel: Kernel) -> None:
    """A million numbers reach beyond 4.5."""
    noise = SeededNoise(7, np.arange(4), (4, 256, 256))
    found, expected = kernel(noise, 3), noise(3)
    assert np.abs(expected).max() > 4.5
    assert np.abs(found - expected).max() <= 1e-5


def need_nvrtc() -> None:
    try:
        nvrtc.compile_cubin("", "80")
    except UnsupportedError as error:
        if "is not there" in error.what:
            pytest.skip(error.what)
        raise


@pytest.mark.parametrize("architecture", ["75", "80", "86", "89", "90", "120"])
def test_nvrtc_compiles_it(architecture: str) -> None:
    need_nvrtc()
    image = nvrtc.compile_cubin(SOURCE, architecture)
    assert image[:4] == b"\x7fELF"
    assert b".text.normal" in image  # under the name that it is loaded by


def test_nvrtc_says_what_it_does_not_compile() -> None:
    need_nvrtc()
    with pytest.raises(UnsupportedError, match="NVRTC does not compile for compute capability 80: .*error"):
        nvrtc.compile_cubin("int broken( {", "80")
    with pytest.raises(UnsupportedError, match="for compute capability 999: .*invalid value"):
        nvrtc.compile_cubin(SOURCE, "999")


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc as bindings

    def missing(*_: Any) -> None:
        raise RuntimeError('Failure finding "libnvrtc.so.13"\nNo such file')

    monkeypatch.setattr(bindings, "nvrtcCreateProgram", missing)
    with pytest.raises(
        UnsupportedError, match='NVRTC is not there: Failure finding "libnvrtc.so.13"\n.*nvidia-cuda-nvrtc'
    ):
        nvrtc.compile_cubin("extern int nothing;", "80")


class FakeDriver:
    """``cuda.bindings.driver``, noting its calls."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails = fails

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return (209 if name == self.fails else 0, f"made by {name}")

        return call

    def cuGetErrorString(self, code: int) -> tuple[int, bytes]:
        return 0, b"no kernel image is available"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> runtime.Cuda:
    """On a GPU of compute capability 8.6."""
    attributes = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=8, cudaDevAttrComputeCapabilityMinor=6)
    fake = SimpleNamespace(
        cudaDeviceAttr=attributes,
        cudaError_t=SimpleNamespace(cudaSuccess=0),
        cudaDeviceGetAttribute=lambda attribute, device: (0, attribute),
    )
    monkeypatch.setattr(runtime, "_runtime", lambda: fake)
    monkeypatch.setattr(runtime, "compile_cubin", lambda source, architecture: f"{source} for {architecture}".encode())
    return runtime.Cuda(0)


def test_a_kernel_is_loaded_launched_and_given_back(cuda: runtime.Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setattr("cuda.bindings.driver", driver, raising=False)
    kernel = cuda.compile("source", "normal")
    cuda.launch_kernel(kernel, 7, 256, [(4096, ctypes.c_void_p), (3, ctypes.c_uint)], 11)
    cuda.unload(kernel)
    module, function = "made by cuModuleLoadData", "made by cuModuleGetFunction"
    parameters = ((4096, 3), (ctypes.c_void_p, ctypes.c_uint))
    assert driver.calls == [
        ("cuModuleLoadData", b"source for 86"),
        ("cuModuleGetFunction", module, b"normal"),
        ("cuLaunchKernel", function, 7, 1, 1, 256, 1, 1, 0, 11, parameters, 0),
        ("cuModuleUnload", module),
    ]


def test_the_drivers_words_are_said(cuda: runtime.Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuda.bindings.driver", FakeDriver("cuModuleLoadData"), raising=False)
    with pytest.raises(BackendError, match=r"cuModuleLoadData failed: no kernel image is available \(error 209\)"):
        cuda.compile("source", "normal")


def test_the_source_lies_beside_its_module() -> None:
    assert Path(runtime.__file__).with_name("noise.cu") == NOISE_SOURCE
