"""In what the kernels of an engine compute, by the engine's precision."""

from __future__ import annotations

from sparse_engine import kernels
from sparse_engine.errors import UnsupportedError
from sparse_engine.kernels.library import Compute

# A session's entry for exact 8-bit products. Without it, ONNX Runtime adds pairs of them up in 16 bits on processors
# with AVX2 or AVX-512 and no VNNI, where they saturate: U-ViTs came out wrong by 4 %. With VNNI it changes nothing.
EXACT_PRODUCTS = ("session.x64quantprecision", "1")


def products_in(precision: str) -> Compute:
    """Of the sparse products: those that an int8 engine keeps in float are kept for their accuracy."""
    return "bf16" if precision == "bf16" else "fp32"


def attention_in(precision: str) -> Compute:
    """Of our own attention. Beside int8 products, bf16 rounds so little that it does not show, where there is bf16."""
    if precision == "int8" and kernels.is_available():
        try:
            kernels.best_tier("bf16")
        except UnsupportedError:
            return "fp32"
        return "bf16"
    return products_in(precision)
