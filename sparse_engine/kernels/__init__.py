"""Kernels for 2:4 sparse layers on CPUs; README.md in this folder explains them."""

from __future__ import annotations

from sparse_engine.kernels.bf16 import MatMulBf16
from sparse_engine.kernels.int8 import MatMulInt8
from sparse_engine.kernels.library import (
    INT8_TIERS,
    ISA_VARIABLE,
    LIBRARY_PATH,
    TIERS,
    MatMul24,
    available_tiers,
    best_tier,
    group_norm,
    is_available,
    peak_flops,
)
from sparse_engine.kernels.packing import pack, pack_codes, unpack, unpack_codes, validate

__all__ = [
    "INT8_TIERS",
    "ISA_VARIABLE",
    "LIBRARY_PATH",
    "TIERS",
    "MatMul24",
    "MatMulBf16",
    "MatMulInt8",
    "available_tiers",
    "best_tier",
    "group_norm",
    "is_available",
    "pack",
    "pack_codes",
    "peak_flops",
    "unpack",
    "unpack_codes",
    "validate",
]
