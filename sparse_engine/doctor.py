"""What this machine can run, and why not: the facts behind ``sparse-engine doctor``."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sparse_engine import __version__, kernels
from sparse_engine.backends import BACKENDS, backend_named
from sparse_engine.cores import usable_cores
from sparse_engine.errors import SparseEngineError, UnsupportedError

PACKAGES = (
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "onnxscript",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-python",
    "tokenizers",
    "fastapi",
    "uvicorn",
    "ray",
)
AMPERE = (8, 0)  # the first compute capability with 2:4 products
_TORCH_FOR_CUDA = "for a GPU: pip uninstall -y torch, then pip install 'torch>=2.7' (on Linux with CUDA)"
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd")


@dataclass(frozen=True)
class Finding:
    """One fact: whether it is good, what was found, and what to do where it is not."""

    name: str
    ok: bool
    found: str
    fix: str | None = None


def diagnose() -> list[Finding]:
    """Look at this machine."""
    return [
        Finding("sparse-engine", True, f"{__version__} on Python {platform.python_version()}, {platform.platform()}"),
        _cpu(),
        _kernels(),
        _gpu(),
        *(_package(name) for name in PACKAGES if _version(name) or name in ("numpy", "onnx")),
        *_conflicts(),
        *(_backend(name) for name in BACKENDS),
        *_torch_on_gpu(),
        _export(),
    ]


def to_dicts(findings: list[Finding]) -> list[dict[str, Any]]:
    """As ``--json`` prints them."""
    return [asdict(finding) for finding in findings]


def _cpu() -> Finding:
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    found = [flag for flag in CPU_FLAGS if flag in flags]
    vectors = ", ".join(found) or "no vector flags known"
    return Finding("CPU", True, f"{usable_cores()} usable cores, {platform.machine()}, {vectors}")


def _kernels() -> Finding:
    if not kernels.is_available():
        fix = "install a C++17 compiler and sparse-engine again: without them 2:4 layers run dense"
        return Finding("CPU kernels", False, "not built", fix)
    try:
        found = f"fp32 on {kernels.best_tier('fp32')}"
        with contextlib.suppress(UnsupportedError):
            found += f", bf16 on {kernels.best_tier('bf16')}"
    except SparseEngineError as error:
        return Finding("CPU kernels", False, error.what, error.fix)
    return Finding("CPU kernels", True, found)


def _gpu() -> Finding:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Finding(
            "NVIDIA GPU",
            False,
            "no driver (libcuda.so.1 is not there)",
            "engines run on the CPU; for a GPU install NVIDIA's driver",
        )
    version, count = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return Finding("NVIDIA GPU", False, "a driver, but no GPU", "check nvidia-smi")
    driver.cuDriverGetVersion(ctypes.byref(version))
    names = []
    for device in range(count.value):
        name = ctypes.create_string_buffer(128)
        driver.cuDeviceGetName(name, len(name), device)
        capability = _compute_capability(driver, device)
        names.append(f"{name.value.decode(errors='replace')} (compute capability {capability})")
    return Finding(
        "NVIDIA GPU", True, f"{', '.join(names)}; driver for CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    )


def _compute_capability(driver: ctypes.CDLL, device: int) -> str:
    """2:4 products need 8.0."""
    numbers = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        number = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        numbers.append(str(number.value))
    return ".".join(numbers)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str) -> Finding:
    version = _version(name)
    return Finding(name, version is not None, version or "not installed", None if version else f"pip install {name}")


def _conflicts() -> list[Finding]:
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if len(both) < 2:
        return []
    fix = "pip uninstall -y onnxruntime onnxruntime-gpu, then install the one you need"
    return [Finding("onnxruntime twice", False, "onnxruntime and onnxruntime-gpu overwrite each other's files", fix)]


def _backend(name: str) -> Finding:
    try:
        found = backend_named(name).availability()
    except (ImportError, OSError) as error:
        return Finding(f"backend {name}", False, f"its library cannot be loaded: {error}", "install it again")
    if found.usable:
        slower = "" if found.automatic else ", on the CPU alone, where onnxruntime is faster"
        return Finding(f"backend {name}", True, f"usable, {found.version}{slower}")
    if found.builds:
        what = f"{found.version} builds engines, but cannot run them here: {found.reason}"
        return Finding(f"backend {name}", False, what, found.fix)
    return Finding(f"backend {name}", False, found.reason or "not usable", found.fix)


def _torch_on_gpu() -> list[Finding]:
    """What the torch backend needs to run 2:4 layers: CUDA, cuSPARSELt, and a GPU that has 2:4 products."""
    if not _version("torch"):
        return []
    try:
        import torch
    except (ImportError, OSError):  # which the finding of the backend says
        return []
    if torch.version.cuda is None:
        found = f"torch {torch.__version__} is built without CUDA and cuSPARSELt"
        return [Finding("torch: CUDA", False, found, _TORCH_FOR_CUDA)]
    library = getattr(torch.backends, "cusparselt", None)
    sparse = Finding("torch: cuSPARSELt", True, "there")
    if library is None or not library.is_available():
        sparse = Finding("torch: cuSPARSELt", False, f"not in torch {torch.__version__}", _TORCH_FOR_CUDA)
    return [Finding("torch: CUDA", True, torch.version.cuda), sparse, _torch_gpu()]


def _torch_gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("torch: 2:4 on a GPU", False, "torch sees no GPU", "check nvidia-smi and the driver's version")
    devices = range(torch.cuda.device_count())
    capabilities = {torch.cuda.get_device_name(each): torch.cuda.get_device_capability(each) for each in devices}
    able = [name for name, capability in capabilities.items() if capability >= AMPERE]
    if able:
        return Finding("torch: 2:4 on a GPU", True, ", ".join(able))
    listed = ", ".join(f"{name} has {major}.{minor}" for name, (major, minor) in capabilities.items())
    fix = "an Ampere GPU or newer; on this one layers run dense"
    return Finding("torch: 2:4 on a GPU", False, f"{listed}; 2:4 needs compute capability 8.0", fix)


def _export() -> Finding:
    missing = [name for name in ("torch", "onnxscript", "safetensors") if not _version(name)]
    if missing:
        return Finding("building engines", False, f"needs {', '.join(missing)}", "pip install 'sparse-engine[export]'")
    return Finding("building engines", True, "torch, onnxscript and safetensors are there")
