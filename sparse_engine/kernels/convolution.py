"""One 2:4 convolution through the compiled kernels: for tests and benchmarks (an engine runs ``Conv24`` nodes)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .library import Activation, Compute, Lanes, _address, _call, _check, _library, best_tier
from .packing import Positions, Values, validate

Padding = tuple[int, int, int, int]


class PackedConvolution:
    """What 2:4 convolutions of all precisions have in common: a packed one behind the C API, and how it is run.

    Attributes:
        rows: output channels, N.
        channels: of the input, C.
    """

    KIND: ClassVar[str]  # in the names of the C API
    rows: int
    channels: int

    def __init__(self) -> None:
        self._handle = ctypes.c_void_p()

    def _convolve(
        self,
        inputs: Sequence[NDArray[Any] | None],
        sizes: tuple[int, int, int],
        operands: Mapping[str, NDArray[np.float32] | None],
        activation: Activation,
        threads: int,
    ) -> NDArray[np.float32]:
        """Run it on inputs that are checked, B images of H x W. Raises InputError on operands that do not fit."""
        batch, height, width = sizes
        places = [ctypes.c_int64(), ctypes.c_int64()]
        self._c_call("out_size", ctypes.c_int64(height), ctypes.c_int64(width), *map(ctypes.byref, places))
        shape = (batch, self.rows, places[0].value, places[1].value)
        given = operands["out"]
        out = np.empty(shape, np.float32) if given is None else given
        made = {**operands, "out": out}
        shapes = {"out": shape, "bias": shape[1:2], "image_bias": shape[:2], "residual": shape}
        for name, expected in shapes.items():
            if (array := made[name]) is not None:
                _check(name, array, expected, np.float32)
        self._c_call(
            "run",
            *map(_address, inputs),
            *map(ctypes.c_int64, sizes),
            *(_address(made[name]) for name in shapes),
            activation.encode(),
            ctypes.c_int(threads),
        )
        return out

    def _c_call(self, what: str, *arguments: Any) -> None:
        _call(f"sparse_engine_{self.KIND}_{what}", self._handle, *arguments)

    def __del__(self) -> None:
        if self._handle:
            getattr(_library(), f"sparse_engine_{self.KIND}_destroy")(self._handle)


class Conv24(PackedConvolution):
    """A 2:4 convolution, packed for one tier: ``y = activation(conv(x) + bias + image_bias) + residual``.

    Args:
        values: kept weights, float32 ``[N, K/2]``, of :func:`~sparse_engine.kernels.packing.conv_as_matrix`'s matrix.
        positions: uint8 ``[N, K/4]``.
        kernel: taps, (height, width).
        stride: of both axes.
        padding: zeros at (top, left, bottom, right).
        upsample: how often each pixel of x is repeated along both axes before (nearest neighbour).
        tier: one of ``TIERS``, or None for the best for ``compute``.
        compute: precision of the products, where ``tier`` is None.
        lanes: ``t-lanes`` (pixels in SIMD lanes) or ``n-lanes`` (output channels), see ``MatMul24``; in bf16 also
            ``r-lanes`` (output channels, a register of the input's permuted at once).

    Raises:
        InputError: weights that are not canonical 2:4, a window that is none, or a name that does not exist.
        UnsupportedError: the machine lacks the tier, or the tier the lanes.
    """

    KIND = "conv24"

    def __init__(
        self,
        values: Values,
        positions: Positions,
        *,
        kernel: tuple[int, int] = (3, 3),
        stride: int = 1,
        padding: Padding = (1, 1, 1, 1),
        upsample: int = 1,
        tier: str | None = None,
        compute: Compute = "fp32",
        lanes: Lanes = "t-lanes",
    ) -> None:
        super().__init__()
        validate(values, positions)
        values, positions = np.ascontiguousarray(values), np.ascontiguousarray(positions)
        self.rows, depth = positions.shape[0], 4 * positions.shape[1]
        self.tier = tier or best_tier(compute)
        _call(
            "sparse_engine_conv24_create",
            ctypes.c_int64(self.rows),
            ctypes.c_int64(depth),
            _address(values),
            _address(positions),
            (ctypes.c_int32 * 8)(*kernel, stride, *padding, upsample),
            self.tier.encode(),
            lanes.encode(),
            ctypes.byref(self._handle),
        )
        self.channels = depth // (kernel[0] * kernel[1])

    def __call__(
        self,
        x: NDArray[np.float32],
        *,
        bias: NDArray[np.float32] | None = None,
        image_bias: NDArray[np.float32] | None = None,
        residual: NDArray[np.float32] | None = None,
        activation: Activation = "none",
        threads: int = 1,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """The convolution of ``x`` ``[B, C, H, W]``: float32 ``[B, N, H', W']``.

        Args:
            x: float32, C-contiguous.
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
        batch, height, width = (x.shape[0], *x.shape[2:]) if x.ndim == 4 else (-1, -1, -1)
        _check("x", x, (batch, self.channels, height, width))
        operands = {"out": out, "bias": bias, "image_bias": image_bias, "residual": residual}
        return self._convolve([x], (batch, height, width), operands, activation, threads)
