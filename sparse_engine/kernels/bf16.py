"""Layers in bf16 with what surrounds them, through the compiled kernels: one, two in a row, and one before those.

``y = activation(round(x') round(W)^T + bias) + residual``, summed in float32; x' is x, normalised or of two parts, or
bfloat16 already. As in :mod:`sparse_engine.kernels.library`, for timing, tests and benchmarks.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparse_engine.errors import InputError

from .int8 import LayerNorm
from .library import Activation, _address, _call, _check, _library
from .packing import Positions, validate

_DTYPES = {"fp32": np.float32, "bf16": np.uint16}


class _Arguments(ctypes.Structure):
    """``sparse_engine_bf16_call`` of src/c_api.h."""

    _fields_ = (
        ("halves", ctypes.c_void_p),
        ("parts", ctypes.c_void_p * 2),
        ("depths", ctypes.c_int64 * 2),
        ("normalise", ctypes.c_int),
        ("gamma", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("tokens", ctypes.c_int64),
        ("front_bias", ctypes.c_void_p),
        ("front_residual", ctypes.c_void_p),
        ("after_bias", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("activation", ctypes.c_char_p),
        ("output", ctypes.c_void_p),
        ("element", ctypes.c_char_p),
        ("threads", ctypes.c_int),
    )


class MatMulBf16:
    """A weight rounded to bfloat16, 2:4 or dense, packed for AVX512-BF16.

    Args:
        values: kept weights, float32 ``[N, K/2]``; dense: all, ``[N, K]``.
        positions: uint8 ``[N, K/4]`` (see :mod:`sparse_engine.kernels.packing`); None: dense.

    Raises:
        InputError: weights that are not canonical.
        UnsupportedError: the machine, or ``SPARSE_ENGINE_ISA``, has no AVX512-BF16.
    """

    def __init__(self, values: NDArray[np.float32], positions: Positions | None = None) -> None:
        self._handle = ctypes.c_void_p()
        if positions is not None:
            validate(values, positions)
        elif values.ndim != 2 or values.dtype != np.float32 or 0 in values.shape:
            raise InputError(f"values are {values.dtype} {list(values.shape)}, expected float32 [N, K]")
        values = np.ascontiguousarray(values)
        positions = None if positions is None else np.ascontiguousarray(positions)
        self.rows, self.depth = len(values), values.shape[1] * (1 if positions is None else 2)
        _call(
            "sparse_engine_bf16_create",
            ctypes.c_int64(self.rows),
            ctypes.c_int64(self.depth),
            _address(values),
            _address(positions),
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
        out: Literal["fp32", "bf16"] = "fp32",
        threads: int = 1,
        after: MatMulBf16 | None = None,
        after_bias: NDArray[np.float32] | None = None,
        front: MatMulBf16 | None = None,
        front_bias: NDArray[np.float32] | None = None,
        front_residual: NDArray[np.float32] | None = None,
        buffer: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """The product for ``x``: ``[M, N]``, float32 or bfloat16 (its bits as uint16).

        Args:
            x: float32 ``[M, K]``, or bfloat16 as uint16.
            beside: more numbers of each token, float32 ``[M, L]``; x is then ``[M, K - L]``, and float32.
            norm: of floats; with ``front`` of what that gives.
            bias: ``[N]``.
            residual: ``[M, N]``, added after the activation; may be ``buffer``.
            activation: ``none``, ``gelu`` (erf), ``gelu-tanh`` or ``silu``; with ``after`` that layer's.
            out: what to give.
            threads: the result does not depend on it.
            after: the layer that comes first: x, beside and norm are that one's.
            after_bias: its bias.
            front: the layer before ``after``, of as many rows as this one has: x and beside are that one's. What it
                gives is added to the output.
            front_bias, front_residual: its bias ``[K of after]``, and ``[M, K of after]``, added to its output.
            buffer: where to write; allocated if None.

        Raises:
            InputError: an array of another shape, dtype or layout, a name that does not exist, layers that do not
                follow one another.
        """
        first = after or self
        entry = front or first
        tokens = x.shape[0] if x.ndim == 2 else -1
        is_halves = x.dtype == np.uint16
        more = beside.shape[1] if beside is not None and beside.ndim == 2 else 0
        if buffer is None:
            buffer = np.empty((max(tokens, 0), self.rows), _DTYPES.get(out, np.float32))
        gamma, beta = (norm.gamma, norm.beta) if norm else (None, None)
        floats = {
            "gamma": (gamma, (first.depth,)),
            "beta": (beta, (first.depth,)),
            "bias": (bias, (self.rows,)),
            "after_bias": (after_bias, (first.rows,)),
            "front_bias": (front_bias, (first.depth,)),
            "front_residual": (front_residual, (tokens, first.depth)),
            "residual": (residual, (tokens, self.rows)),
        }
        _check("x", x, (tokens, entry.depth - more), np.uint16 if is_halves else np.float32)
        _check("buffer", buffer, (tokens, self.rows), _DTYPES.get(out, np.float32))
        for name, (array, shape) in {"beside": (beside, (tokens, more)), **floats}.items():
            if array is not None:
                _check(name, array, shape, np.float32)
        _check_what_goes_together(is_halves, beside is not None, norm is not None, front is not None)
        if front is not None and (after is None or residual is not None):
            raise InputError("a front comes before two layers, and is what is added to their output")
        arguments = _Arguments(
            halves=_address(x if is_halves else None),
            parts=(ctypes.c_void_p * 2)(_address(None if is_halves else x).value, _address(beside).value),
            depths=(ctypes.c_int64 * 2)(entry.depth - more, more),
            normalise=norm is not None,
            epsilon=norm.epsilon if norm else 0.0,
            tokens=tokens,
            activation=activation.encode(),
            output=_address(buffer),
            element=out.encode(),
            threads=threads,
            **{name: _address(array) for name, (array, _) in floats.items()},
        )
        handles = (front._handle if front else None, first._handle, self._handle if after else None)
        _call("sparse_engine_bf16_run", *handles, ctypes.byref(arguments))
        return buffer

    @property
    def packed_bytes(self) -> int:
        """Memory of the packed weights."""
        return int(_library().sparse_engine_bf16_packed_bytes(self._handle))

    def __del__(self) -> None:
        if self._handle:
            _library().sparse_engine_bf16_destroy(self._handle)


def _check_what_goes_together(is_halves: bool, is_beside: bool, is_normalised: bool, has_front: bool) -> None:
    """A front's output is normalised in the place of x."""
    is_normalised = is_normalised and not has_front
    if (is_halves and (is_beside or is_normalised)) or (is_beside and is_normalised):
        raise InputError("bfloat16 is neither normalised nor put beside floats, nor are two parts normalised")
