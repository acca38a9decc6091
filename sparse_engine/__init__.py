"""Inference engines for 2:4-sparse diffusion models.

    from sparse_engine import SparseEngine

    with SparseEngine.load("model.sengine") as engine:
        images = engine.sample(16, steps=50, seed=0)

Importing this package loads nothing heavy: NumPy, ONNX Runtime and the rest come with the first engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparse_engine.version import __version__

if TYPE_CHECKING:
    from sparse_engine.engine import SparseEngine
    from sparse_engine.errors import SparseEngineError

__all__ = ["SparseEngine", "SparseEngineError", "__version__"]

_HOMES = {"SparseEngine": "sparse_engine.engine", "SparseEngineError": "sparse_engine.errors"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
