"""Canonical 2:4 weights: what an engine file stores, and the kernels are created from.

A weight ``[N, K]`` becomes ``values`` float32 ``[N, K/2]``, the two kept weights of each group of four, and
``positions`` uint8 ``[N, K/4]``, where in the group they stood: ``first | second << 2``, first < second. That
is 53% of the dense float32 bytes in an engine file's four bits per group, 56% in the byte used here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from sparse_engine.errors import InputError, UnsupportedError

Values = NDArray[np.float32]
Positions = NDArray[np.uint8]

_CROWDED = 255  # more than two nonzeros


def _kept_by_pattern() -> Positions:
    """uint8 [16]: pattern of nonzeros (bit i is weight i) -> ``first | second << 2``, or _CROWDED."""
    nonzero = np.unpackbits(np.arange(16, dtype=np.uint8)[:, None], axis=1, bitorder="little")[:, :4]
    kept = np.sort(np.argsort(1 - nonzero, axis=1, kind="stable")[:, :2], axis=1)
    return np.where(nonzero.sum(axis=1) > 2, _CROWDED, kept[:, 0] | kept[:, 1] << 2).astype(np.uint8)


_KEPT = _kept_by_pattern()


def pack(weight: NDArray[np.float32]) -> tuple[Values, Positions]:
    """Compress a dense weight that is 2:4 along its last axis.

    A group with fewer than two nonzeros keeps zeros as well, at the lowest free positions.

    Args:
        weight: float32 ``[N, K]``, K a multiple of 4.

    Returns:
        values ``[N, K/2]`` and positions ``[N, K/4]``.

    Raises:
        InputError: not a float32 matrix with K % 4 == 0.
        UnsupportedError: a group has more than two nonzeros; row and group are named.
    """
    return _pack(weight, np.float32)


def pack_codes(codes: NDArray[np.int8]) -> tuple[NDArray[np.int8], Positions]:
    """As :func:`pack`, of codes int8 ``[N, K]``: values int8 ``[N, K/2]`` and positions."""
    return _pack(codes, np.int8)


def _pack(weight: NDArray[Any], dtype: npt.DTypeLike) -> tuple[NDArray[Any], Positions]:
    if weight.ndim != 2 or weight.dtype != dtype or 0 in weight.shape or weight.shape[1] % 4:
        raise InputError(
            f"weight is {weight.dtype} {list(weight.shape)}, expected {np.dtype(dtype)} [N, K] with K a multiple of 4"
        )
    weight = np.ascontiguousarray(weight)
    groups = weight.reshape(weight.shape[0], -1, 4)
    nonzero = groups != 0  # NaN counts, -0.0 does not
    positions = _KEPT[np.packbits(nonzero, axis=-1, bitorder="little")[..., 0]]
    crowded = np.argwhere(positions == _CROWDED)
    if len(crowded):
        row, group = (int(i) for i in crowded[0])
        raise UnsupportedError(
            f"weight is not 2:4: row {row}, group {group} (columns {4 * group} to {4 * group + 3}) has "
            f"{int(nonzero[row, group].sum())} nonzeros, expected at most 2; {len(crowded)} groups have too many",
            fix="bake the 2:4 mask into the weight first, or run this layer dense",
        )
    first = np.arange(0, weight.size, 4).reshape(positions.shape)
    values = np.empty((*positions.shape, 2), weight.dtype)
    np.take(weight.reshape(-1), first + (positions & 3), out=values[..., 0])
    np.take(weight.reshape(-1), first + (positions >> 2), out=values[..., 1])
    return values.reshape(weight.shape[0], -1), positions


def unpack(values: Values, positions: Positions) -> NDArray[np.float32]:
    """The dense float32 weight ``[N, K]`` of canonical ``values`` and ``positions``.

    Raises:
        InputError: see :func:`validate`.
    """
    validate(values, positions)
    return _unpack(values, positions)


def unpack_codes(values: NDArray[np.int8], positions: Positions) -> NDArray[np.int8]:
    """As :func:`unpack`, of codes: int8 ``[N, K]``."""
    validate(values, positions, np.int8)
    return _unpack(values, positions)


def _unpack(values: NDArray[Any], positions: Positions) -> NDArray[Any]:
    rows, groups = positions.shape
    weight = np.zeros((rows, groups, 4), values.dtype)
    kept = np.stack([positions & 3, positions >> 2], axis=-1).astype(np.intp)
    np.put_along_axis(weight, kept, values.reshape(rows, groups, 2), axis=-1)
    return weight.reshape(rows, -1)


def validate(values: NDArray[Any], positions: Positions, dtype: npt.DTypeLike = np.float32) -> None:
    """Check that ``values``, of ``dtype``, and ``positions`` are canonical 2:4 weights.

    Raises:
        InputError: wrong dtype or shape, or positions that are not ``first | second << 2`` with
            first < second; row and group are named.
    """
    if values.ndim != 2 or values.dtype != dtype or positions.ndim != 2 or positions.dtype != np.uint8:
        raise InputError(
            f"values are {values.dtype} {list(values.shape)} and positions {positions.dtype} "
            f"{list(positions.shape)}, expected {np.dtype(dtype)} [N, K/2] and uint8 [N, K/4]"
        )
    if 0 in positions.shape or values.shape != (positions.shape[0], 2 * positions.shape[1]):
        raise InputError(
            f"values {list(values.shape)} and positions {list(positions.shape)} do not belong together, "
            f"expected [N, K/2] and [N, K/4]"
        )
    wrong = np.argwhere((positions > 15) | ((positions & 3) >= (positions >> 2)))
    if len(wrong):
        row, group = (int(i) for i in wrong[0])
        raise InputError(
            f"positions of row {row}, group {group} are {int(positions[row, group])}, "
            f"expected first | second << 2 with first < second <= 3"
        )


def conv_as_matrix(weight: NDArray[Any]) -> NDArray[Any]:
    """A convolution's weight ``[N, C, kh, kw]`` as the matrix ``[N, K]`` whose rows :func:`pack` takes.

    K runs over (C / 4, kh, kw, 4): four neighbouring input channels of one tap side by side.

    Raises:
        InputError: not float32, or codes int8, ``[N, C, kh, kw]`` with C a multiple of 4.
    """
    if weight.ndim != 4 or weight.dtype not in (np.float32, np.int8) or 0 in weight.shape or weight.shape[1] % 4:
        raise InputError(
            f"weight is {weight.dtype} {list(weight.shape)}, expected float32 or int8 [N, C, kh, kw] with C a multiple "
            f"of 4"
        )
    rows, channels, *taps = weight.shape
    quads = weight.reshape(rows, channels // 4, 4, -1).swapaxes(2, 3)
    return np.ascontiguousarray(quads.reshape(rows, channels * taps[0] * taps[1]))


def matrix_as_conv(matrix: NDArray[Any], kernel: tuple[int, int]) -> NDArray[Any]:
    """What :func:`conv_as_matrix` was given, of a kernel of ``(kh, kw)`` taps."""
    rows, taps = len(matrix), kernel[0] * kernel[1]
    quads = matrix.reshape(rows, -1, taps, 4).swapaxes(2, 3)
    return np.ascontiguousarray(quads.reshape(rows, -1, *kernel))
