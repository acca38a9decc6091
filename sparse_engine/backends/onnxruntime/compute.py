"""In what the kernels of an engine compute, by the engine's precision."""

from __future__ import annotations

from sparse_engine import kernels
from sparse_engine.errors import UnsupportedError
from sparse_engine.kernels.library import Compute

# A session's entry for exact 8-bit products. Without it, ONNX Runtime adds pairs of them up in 16 bits on processors
# with AVX2 or AVX-512 and no VNNI, where they saturate: U-ViTs came out wrong by 4 %. With VNNI it changes nothing.
EXACT_PRODUCTS = ("session.x64quantprecision", "1")
NO_SPINNING = ("session.force_spinning_stop", "1")  # of a session that is timed: not into the next one's turn


def products_in(precision: str) -> Compute:
    """Of the sparse products: those that an int8 engine keeps in float are kept for their accuracy."""
    return "bf16" if precision == "bf16" else "fp32"


def attention_in(precision: str) -> Compute:
    """Of our own attention. Beside int8 products 8 bits do, or bf16: they round as little as what is around them."""
    if precision != "int8" or not kernels.is_available():
        return products_in(precision)
    return "int8" if kernels.best_tier("int8") == "avx512-vnni" else halves_or_floats()


def halves_or_floats() -> Compute:
    """bf16 where the machine has it."""
    try:
        kernels.best_tier("bf16")
    except UnsupportedError:
        return "fp32"
    return "bf16"
