"""Layers in 8 bits through the compiled kernels: one product, or two in a row.

``y = activation(W_scale x_scale (x - x_zero) W^T + bias) + residual``, codes x of 0..255 and W of -127..127, whose sums
are exact. As in :mod:`sparse_engine.kernels.library`, for timing, tests and benchmarks.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparse_engine.errors import InputError

from .library import Activation, _address, _call, _check, _library, best_tier
from .packing import Positions, validate

Element = Literal["fp32", "bf16", "codes"]
_DTYPES = {"fp32": np.float32, "bf16": np.uint16, "codes": np.uint8}


class Codes(NamedTuple):
    """value = scale (code - zero), code 0..255."""

    scale: float
    zero: int = 0


class LayerNorm(NamedTuple):
    """A layer normalisation over K, before x is rounded to codes: gamma and beta ``[K]``; None is 1 and 0."""

    gamma: NDArray[np.float32] | None = None
    beta: NDArray[np.float32] | None = None
    epsilon: float = 1e-5


class _Arguments(ctypes.Structure):
    """``sparse_engine_int8_call`` of src/c_api.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("parts", ctypes.c_void_p * 2),
        ("depths", ctypes.c_int64 * 2),
        ("normalise", ctypes.c_int),
        ("gamma", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("tokens", ctypes.c_int64),
        ("first_bias", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("activation", ctypes.c_char_p),
        ("output", ctypes.c_void_p),
        ("element", ctypes.c_char_p),
        ("output_scale", ctypes.c_float),
        ("output_zero", ctypes.c_int),
        ("threads", ctypes.c_int),
    )


class MatMulInt8:
    """A weight in 8 bits, 2:4 or dense, packed for one tier.

    Args:
        values: kept codes, int8 ``[N, K/2]``; dense: all, ``[N, K]``.
        scales: float32 ``[N]``, of each row's codes.
        positions: uint8 ``[N, K/4]`` (see :mod:`sparse_engine.kernels.packing`); None: dense.
        x: the codes that it is given, or rounds floats to.
        tier: one of ``INT8_TIERS``; None is the best.

    Raises:
        InputError: weights that are not canonical, more than 65,536 of K, scales or codes that are none.
        UnsupportedError: the machine lacks the tier, or the tier has no such products.
    """

    def __init__(
        self,
        values: NDArray[np.int8],
        scales: NDArray[np.float32],
        positions: Positions | None = None,
        *,
        x: Codes,
        tier: str | None = None,
    ) -> None:
        self._handle = ctypes.c_void_p()
        if positions is not None:
            validate(values, positions, np.int8)
        elif values.ndim != 2 or values.dtype != np.int8 or 0 in values.shape:
            raise InputError(f"values are {values.dtype} {list(values.shape)}, expected int8 [N, K]")
        values, scales = np.ascontiguousarray(values), np.ascontiguousarray(scales, np.float32)
        positions = None if positions is None else np.ascontiguousarray(positions)
        self.rows, self.depth = len(values), values.shape[1] * (1 if positions is None else 2)
        _check("scales", scales, (self.rows,), np.float32)
        _call(
            "sparse_engine_int8_create",
            ctypes.c_int64(self.rows),
            ctypes.c_int64(self.depth),
            _address(values),
            _address(positions),
            _address(scales),
            ctypes.c_float(x.scale),
            ctypes.c_int(x.zero),
            (tier or best_tier("int8")).encode(),
            ctypes.byref(self._handle),
        )

    def __call__(
        self,
        x: NDArray[Any],
        *,
        beside: NDArray[np.float32] | None = None,
        norm: LayerNorm | None = None,
        bias: NDArray[np.float32] | None = None,
        residual: NDArray[np.float32] | None = None,
        activation: Activation = "none",
        out: Element = "fp32",
        y: Codes | None = None,
        threads: int = 1,
        after: MatMulInt8 | None = None,
        after_bias: NDArray[np.float32] | None = None,
        buffer: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """The product for ``x``: ``[M, N]``, float32, bfloat16 (its bits as uint16) or codes (uint8).

        Args:
            x: codes uint8 ``[M, K]``, or float32, which are rounded to the layer's codes first.
            beside: more numbers of each token, float32 ``[M, L]``; x is then ``[M, K - L]``, and float32.
            norm: of floats.
            bias: ``[N]``.
            residual: ``[M, N]``, added after the activation; may be ``buffer``.
            activation: ``none``, ``gelu`` (erf), ``gelu-tanh`` or ``silu``; with ``after`` that layer's.
            out: what to give.
            y: the codes to give.
            threads: the result does not depend on it.
            after: the layer that comes first, of which this one takes codes: x, beside and norm are that one's.
            after_bias: its bias.
            buffer: where to write; allocated if None.

        Raises:
            InputError: an array of another shape, dtype or layout, a name that does not exist, ``after`` does not give
                what this layer takes.
        """
        first = after or self
        tokens = x.shape[0] if x.ndim == 2 else -1
        is_codes = x.dtype == np.uint8
        more = beside.shape[1] if beside is not None and beside.ndim == 2 else 0
        if buffer is None:
            buffer = np.empty((max(tokens, 0), self.rows), _DTYPES.get(out, np.float32))
        gamma, beta = (norm.gamma, norm.beta) if norm else (None, None)
        for name, array, shape in (
            ("x", x, (tokens, first.depth - more)),
            ("beside", beside, (tokens, more)),
            ("gamma", gamma, (first.depth,)),
            ("beta", beta, (first.depth,)),
            ("bias", bias, (self.rows,)),
            ("after_bias", after_bias, (first.rows,)),
            ("residual", residual, (tokens, self.rows)),
            ("buffer", buffer, (tokens, self.rows)),
        ):
            kind = np.uint8 if name == "x" and is_codes else np.float32
            if array is not None:
                _check(name, array, shape, _DTYPES.get(out, np.float32) if name == "buffer" else kind)
        if ((is_codes or beside is not None) and norm is not None) or (is_codes and beside is not None):
            raise InputError("codes are neither normalised nor put beside floats, nor are two parts normalised")
        y = y or Codes(1.0)
        arguments = _Arguments(
            codes=_address(x if is_codes else None),
            parts=(ctypes.c_void_p * 2)(_address(None if is_codes else x).value, _address(beside).value),
            depths=(ctypes.c_int64 * 2)(first.depth - more, more),
            normalise=norm is not None,
            gamma=_address(gamma),
            beta=_address(beta),
            epsilon=norm.epsilon if norm else 0.0,
            tokens=tokens,
            first_bias=_address(after_bias),
            bias=_address(bias),
            residual=_address(residual),
            activation=activation.encode(),
            output=_address(buffer),
            element=out.encode(),
            output_scale=y.scale,
            output_zero=y.zero,
            threads=threads,
        )
        second = self._handle if after else None
        _call("sparse_engine_int8_run", first._handle, second, ctypes.byref(arguments))
        return buffer

    @property
    def tier(self) -> str:
        """The tier that computes it."""
        return str(_library().sparse_engine_int8_tier(self._handle).decode())

    @property
    def packed_bytes(self) -> int:
        """Memory of the packed weights."""
        return int(_library().sparse_engine_int8_packed_bytes(self._handle))

    def __del__(self) -> None:
        if self._handle:
            _library().sparse_engine_int8_destroy(self._handle)
