"""One 2:4 convolution in 8 bits through the compiled kernels: for tests and benchmarks (an engine runs ``ConvInt8``).

``y = activation(conv(W_scale x_scale (x - x_zero)) + bias + image_bias) + residual``, codes x of 0..255 and W of
-127..127, whose sums are exact; what lies outside an image is 0.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_engine.errors import InputError

from .convolution import PackedConvolution, Padding
from .int8 import Codes
from .library import Activation, _address, _call, _check, _library, best_tier
from .packing import Positions, validate


class ConvInt8(PackedConvolution):
    """A 2:4 convolution in 8 bits, packed for one tier.

    Args:
        values: kept codes, int8 ``[N, K/2]``, of :func:`~sparse_engine.kernels.packing.conv_as_matrix`'s matrix.
        scales: float32 ``[N]``, of each output channel's codes.
        positions: uint8 ``[N, K/4]``.
        x: the codes that it is given, or rounds floats to.
        kernel: taps, (height, width).
        stride: of both axes.
        padding: zeros at (top, left, bottom, right).
        upsample: how often each pixel of x is repeated along both axes before (nearest neighbour).
        tier: one of ``INT8_TIERS``; None is the best.

    Raises:
        InputError: weights that are not canonical, more than 65,536 of K, scales, codes or a window that are none.
        UnsupportedError: the machine lacks the tier, or the tier has no such convolutions.
    """

    KIND = "conv_int8"

    def __init__(
        self,
        values: NDArray[np.int8],
        scales: NDArray[np.float32],
        positions: Positions,
        *,
        x: Codes,
        kernel: tuple[int, int] = (3, 3),
        stride: int = 1,
        padding: Padding = (1, 1, 1, 1),
        upsample: int = 1,
        tier: str | None = None,
    ) -> None:
        super().__init__()
        validate(values, positions, np.int8)
        values, positions = np.ascontiguousarray(values), np.ascontiguousarray(positions)
        scales = np.ascontiguousarray(scales, np.float32)
        self.rows, depth = positions.shape[0], 4 * positions.shape[1]
        _check("scales", scales, (self.rows,), np.float32)
        _call(
            "sparse_engine_conv_int8_create",
            ctypes.c_int64(self.rows),
            ctypes.c_int64(depth),
            _address(values),
            _address(positions),
            _address(scales),
            ctypes.c_float(x.scale),
            ctypes.c_int(x.zero),
            (ctypes.c_int32 * 8)(*kernel, stride, *padding, upsample),
            (tier or best_tier("int8 convolutions")).encode(),
            ctypes.byref(self._handle),
        )
        self.channels = depth // (kernel[0] * kernel[1])

    def __call__(
        self,
        x: NDArray[Any],
        *,
        bias: NDArray[np.float32] | None = None,
        image_bias: NDArray[np.float32] | None = None,
        residual: NDArray[np.float32] | None = None,
        activation: Activation = "none",
        threads: int = 1,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """The convolution of ``x``: float32 ``[B, N, H', W']``.

        Args:
            x: codes uint8 ``[B, H, W, C]``, or float32 ``[B, C, H, W]``, which are rounded to codes first.
            bias: ``[N]``.
            image_bias: ``[B, N]``, added beside the bias.
            residual: of the output's shape, added after the activation; may be ``out``.
            activation: ``none``, ``gelu`` (erf), ``gelu-tanh`` or ``silu``.
            threads: the result does not depend on it.
            out: where to write; allocated if None.

        Raises:
            InputError: an array of another shape, dtype or layout, images smaller than the window, or an unknown
                activation.
        """
        if x.ndim != 4:
            raise InputError(f"x is {x.dtype} {list(x.shape)}, expected float32 [B, C, H, W] or uint8 [B, H, W, C]")
        is_codes = x.dtype == np.uint8
        batch, *places = x.shape
        height, width = places[:2] if is_codes else places[1:]
        given = (batch, height, width, self.channels) if is_codes else (batch, self.channels, height, width)
        _check("x", x, given, np.uint8 if is_codes else np.float32)
        inputs = [x, None] if is_codes else [None, x]
        operands = {"out": out, "bias": bias, "image_bias": image_bias, "residual": residual}
        return self._convolve(inputs, (batch, height, width), operands, activation, threads)

    @property
    def tier(self) -> str:
        """The tier that computes it."""
        return str(_library().sparse_engine_conv_int8_tier(self._handle).decode())
