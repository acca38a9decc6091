"""The 8-bit number formats: their scales and zero points, and the rounding that they do."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto


@dataclass(frozen=True)
class Format:
    """An 8-bit format: value = scale (code - zero point).

    Attributes:
        name: as it stands in reports.
        onnx_type: the element type in a graph.
        dtype: NumPy's.
        lowest, highest: the codes in use. int8 leaves -128 out, so that it is symmetric.
        symmetric: the zero point is 0.
    """

    name: str
    onnx_type: int
    dtype: npt.DTypeLike
    lowest: float
    highest: float
    symmetric: bool = True

    def scale_and_zero(self, low: npt.ArrayLike, high: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """The scale (float32) and zero point (of ``dtype``) that cover [low, high] and represent 0 exactly.

        ``low`` and ``high`` may be arrays: one entry for each channel. A range of nothing but 0 gets the scale 1.
        """
        low = np.minimum(np.asarray(low, np.float64), 0)
        high = np.maximum(np.asarray(high, np.float64), 0)
        if self.symmetric:
            scale = np.maximum(-low, high) / self.highest
            zero = np.zeros_like(scale)
        else:
            scale = (high - low) / (self.highest - self.lowest)
            zero = np.rint(self.lowest - low / np.where(scale > 0, scale, 1))
        scale = np.asarray(scale, np.float32)
        return np.where(scale > 0, scale, np.float32(1)), np.asarray(zero).astype(self.dtype)

    def quantize(self, values: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """Values -> codes, rounded to nearest even and saturated, as ONNX's QuantizeLinear does it."""
        scaled = values / scale
        if not np.issubdtype(self.dtype, np.integer):
            return np.clip(scaled, self.lowest, self.highest).astype(self.dtype)
        return np.clip(np.rint(scaled) + zero.astype(np.float32), self.lowest, self.highest).astype(self.dtype)

    def dequantize(self, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """Codes -> float32 values."""
        return (codes.astype(np.float32) - zero.astype(np.float32)) * scale


UINT8 = Format("uint8", TensorProto.UINT8, np.uint8, 0, 255, symmetric=False)
INT8 = Format("int8", TensorProto.INT8, np.int8, -127, 127)
FLOAT8 = Format("float8_e4m3fn", TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn, -448, 448)
