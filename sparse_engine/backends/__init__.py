"""The backends, by the names that manifests and ``--backend`` use. Each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from sparse_engine.errors import OptionError, UnsupportedError

from .base import Availability, Backend, Payload, PayloadFile, StepGraph, StepRunner
from .options import BuildOptions, TensorRTOptions

# Name -> "module:class", the fastest first: "auto" takes the first that this machine can run.
BACKENDS = {
    "tensorrt": "sparse_engine.backends.tensorrt:TensorRTBackend",
    "torch": "sparse_engine.backends.torch:TorchBackend",
    "tensorrt-rtx": "sparse_engine.backends.tensorrt:TensorRTRTXBackend",
    "onnxruntime": "sparse_engine.backends.onnxruntime:OnnxRuntimeBackend",
}

__all__ = [
    "BACKENDS",
    "Availability",
    "Backend",
    "BuildOptions",
    "Payload",
    "PayloadFile",
    "StepGraph",
    "StepRunner",
    "TensorRTOptions",
    "backend_named",
    "usable_backend",
]


def backend_named(name: str) -> Backend:
    """Look a backend up. Raises OptionError on a name that is none."""
    if name not in BACKENDS:
        raise OptionError(f"backend {name!r} is not known; expected auto or one of: {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(import_module(module), attribute)()
    return backend


def usable_backend(name: str = "auto", *, to_build: bool = False) -> Backend:
    """A backend that this machine can run: the one named, or the fastest.

    ``to_build``: one that is named need not run here, so long as it builds.

    Raises:
        OptionError: no such backend.
        UnsupportedError: this machine cannot run it; the message says why and what to install.
    """
    candidates = [backend_named(each) for each in (BACKENDS if name == "auto" else (name,))]
    reasons = []
    for backend in candidates:
        found = backend.availability()
        if found.usable and (found.automatic or name != "auto"):
            return backend
        if to_build and found.builds and name != "auto":
            return backend
        reasons.append((f"{backend.name}: {found.reason or 'only by name'}", found.fix))
    raise UnsupportedError("no backend can run here: " + "; ".join(reason for reason, _ in reasons), reasons[0][1])
