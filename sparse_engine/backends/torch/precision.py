"""Precisions by name; imports no torch."""

from __future__ import annotations


def float_precision(precision: str) -> str:
    """What the layers of an engine are in that are not in 8 bits."""
    return {"int8": "fp16", "fp8": "fp16"}.get(precision, precision)
