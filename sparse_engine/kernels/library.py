"""The compiled kernels, through ctypes: where the library is, what this machine runs, one product at a time.

An engine runs the kernels inside ONNX Runtime (see ``src/ort_library.cpp``); this module is for timing tactics,
for tests and for benchmarks.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparse_engine.errors import BackendError, InputError, SparseEngineError, UnsupportedError
from sparse_engine.kernels.packing import Positions, Values, validate

LIBRARY_PATH = Path(__file__).with_name("libsparse_engine_kernels.so")
TIERS = ("scalar", "avx2", "avx512", "avx512-bf16", "neon")
INT8_TIERS = ("scalar", "avx-vnni", "avx512-vnni", "neon-dot")  # of products in 8 bits, which compute nothing else
ISA_VARIABLE = "SPARSE_ENGINE_ISA"
_ABI_VERSION = 8
_MESSAGE_BYTES = 512

Lanes = Literal["t-lanes", "n-lanes", "r-lanes"]  # the last of convolutions in bf16 alone
Compute = Literal["fp32", "bf16", "int8"]
Activation = Literal["none", "gelu", "gelu-tanh", "silu"]


def is_available() -> bool:
    """Whether the library was built with this installation (a source install without a compiler has none)."""
    return LIBRARY_PATH.is_file()


def available_tiers(compute: Compute = "fp32") -> tuple[str, ...]:
    """The tiers that this machine runs, of ``TIERS``, or ``INT8_TIERS``. ``SPARSE_ENGINE_ISA`` does not change them."""
    library = _library()
    return tuple(
        tier for tier in (INT8_TIERS if compute == "int8" else TIERS) if library.sparse_engine_has_tier(tier.encode())
    )


def best_tier(compute: Compute | Literal["int8 convolutions"] = "fp32") -> str:
    """The tier that products of this precision run on; ``SPARSE_ENGINE_ISA`` sets the highest allowed.

    Convolutions run where products of their precision do; those in 8 bits say for themselves where.

    Raises:
        UnsupportedError: bf16 on a machine without AVX512-BF16, or a forced tier which the machine lacks.
        InputError: ``SPARSE_ENGINE_ISA`` or ``compute`` is not a name that exists.
    """
    tier = ctypes.c_char_p()
    _call("sparse_engine_best_tier", compute.encode(), ctypes.byref(tier))
    return (tier.value or b"").decode()


def peak_flops(tier: str, *, load: bool = False) -> float:
    """What one core can do at most on a tier, in FLOP/s, measured now (some 20 ms).

    Args:
        tier: one of ``TIERS`` or ``INT8_TIERS``; the scalar tier has no peak (NaN).
        load: multiply-adds that load an operand from L1, as the 2:4 kernels' do, instead of registers only.

    Raises:
        UnsupportedError: the machine lacks the tier.
        InputError: there is no such tier.
    """
    flops = ctypes.c_double()
    _call("sparse_engine_peak_flops", tier.encode(), ctypes.c_int(load), ctypes.byref(flops))
    return flops.value


def group_norm(
    x: NDArray[np.float32],
    groups: int,
    *,
    epsilon: float = 1e-5,
    gamma: NDArray[np.float32] | None = None,
    beta: NDArray[np.float32] | None = None,
    scale: NDArray[np.float32] | None = None,
    shift: NDArray[np.float32] | None = None,
    activation: Activation = "none",
    tier: str | None = None,
    threads: int = 1,
    out: NDArray[np.float32] | None = None,
    codes: tuple[float, int] | None = None,
    codes_tier: str | None = None,
) -> NDArray[Any]:
    """Group normalisation: ``activation((norm(x) * gamma + beta) * (1 + scale) + shift)``, of ``x``'s shape.

    Source: Wu and He, "Group Normalization", ECCV 2018 (arXiv 1803.08494); scale and shift of each image as in Dhariwal
    and Nichol (arXiv 2105.05233).

    Args:
        x: float32 ``[B, C, ...]``, C-contiguous.
        groups: divides C.
        epsilon: added to the variance.
        gamma, beta: ``[C]``; None is 1 and 0.
        scale, shift: ``[B, C]``; None is 0.
        activation: ``none`` or ``silu``.
        tier: one of ``TIERS``, or None for the best.
        threads: the result does not depend on it.
        out: where to write, which may be ``x``; allocated if None.
        codes: scale and zero point of codes to give instead, uint8 ``[B, ..., C]``, and not into ``out``.
        codes_tier: one of ``INT8_TIERS``, which writes them; None is the best.

    Raises:
        InputError: an array of another shape, dtype or layout, groups that do not divide C, or a name that does not
            exist.
        UnsupportedError: the machine lacks the tier.
    """
    if x.ndim < 3:
        raise InputError(f"x is of shape {list(x.shape)}, expected [B, C, L] or [B, C, H, W]")
    out = np.empty(x.shape, np.float32) if out is None else out
    batch, channels = x.shape[:2]
    coded = np.empty((batch, *x.shape[2:], channels), np.uint8) if codes else None
    for name, array, shape in (
        ("x", x, x.shape),
        ("out", out, x.shape),
        ("gamma", gamma, (channels,)),
        ("beta", beta, (channels,)),
        ("scale", scale, (batch, channels)),
        ("shift", shift, (batch, channels)),
    ):
        if array is not None:
            _check(name, array, shape)
    _call(
        "sparse_engine_group_norm",
        _address(x),
        *(ctypes.c_int64(size) for size in (batch, channels, math.prod(x.shape[2:]), groups)),
        ctypes.c_float(epsilon),
        *(_address(array) for array in (gamma, beta, scale, shift)),
        activation.encode(),
        (tier or best_tier()).encode(),
        ctypes.c_int(threads),
        _address(out),
        (codes_tier or best_tier("int8 convolutions")).encode(),
        *((ctypes.c_float(codes[0]), ctypes.c_int(codes[1])) if codes else (ctypes.c_float(1.0), ctypes.c_int(0))),
        _address(coded),
    )
    return out if coded is None else coded


class MatMul24:
    """A 2:4 weight, packed for one tier: ``y = activation(x @ weight.T + bias) + residual``.

    Args:
        values: kept weights, float32 ``[N, K/2]``.
        positions: uint8 ``[N, K/4]`` (see :mod:`sparse_engine.kernels.packing`).
        tier: one of ``TIERS``, or None for the best for ``compute``.
        compute: precision of the products, where ``tier`` is None.
        lanes: ``t-lanes`` (tokens in SIMD lanes) or ``n-lanes`` (output rows), which is faster for few tokens. They
            add up in different orders: a row of ``x`` gives the same bits whatever else is in a call, within either.

    Raises:
        InputError: weights that are not canonical 2:4, or a name that does not exist.
        UnsupportedError: the machine lacks the tier.
    """

    def __init__(
        self,
        values: Values,
        positions: Positions,
        *,
        tier: str | None = None,
        compute: Compute = "fp32",
        lanes: Lanes = "t-lanes",
    ) -> None:
        self._handle = ctypes.c_void_p()
        validate(values, positions)
        values, positions = np.ascontiguousarray(values), np.ascontiguousarray(positions)
        self.rows, self.depth = positions.shape[0], 4 * positions.shape[1]
        _call(
            "sparse_engine_matmul24_create",
            ctypes.c_int64(self.rows),
            ctypes.c_int64(self.depth),
            _address(values),
            _address(positions),
            (tier or best_tier(compute)).encode(),
            lanes.encode(),
            ctypes.byref(self._handle),
        )

    def __call__(
        self,
        x: NDArray[np.float32],
        *,
        bias: NDArray[np.float32] | None = None,
        residual: NDArray[np.float32] | None = None,
        activation: Activation = "none",
        threads: int = 1,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """The product for ``x`` ``[M, K]``: float32 ``[M, N]``.

        Args:
            x: float32, C-contiguous.
            bias: ``[N]``.
            residual: ``[M, N]``, added after the activation; may be ``out``.
            activation: ``none``, ``gelu`` (erf), ``gelu-tanh`` or ``silu``.
            threads: the result does not depend on it.
            out: where to write; allocated if None.

        Raises:
            InputError: an array of another shape, dtype or layout, or an unknown activation.
        """
        tokens, out = self._check_call(x, self.depth, bias, residual, out)
        _call(
            "sparse_engine_matmul24_run",
            self._handle,
            _address(x),
            ctypes.c_int64(tokens),
            _address(out),
            _address(bias),
            _address(residual),
            activation.encode(),
            ctypes.c_int(threads),
        )
        return out

    def after(
        self,
        first: MatMul24,
        x: NDArray[np.float32],
        *,
        first_bias: NDArray[np.float32] | None = None,
        activation: Activation = "none",
        bias: NDArray[np.float32] | None = None,
        residual: NDArray[np.float32] | None = None,
        threads: int = 1,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Two layers in a row: this one of ``first(x, bias=first_bias, activation=activation)``.

        To the bit what two calls give, but what ``first`` gives stays in the caches. Arguments as those of a call.

        Raises:
            InputError: also where ``first`` does not give what this one takes, or is of another tier or other lanes.
            UnsupportedError: a tier without such a kernel (scalar).
        """
        tokens, out = self._check_call(x, first.depth, bias, residual, out)
        if first_bias is not None:
            _check("first_bias", first_bias, (first.rows,))
        _call(
            "sparse_engine_matmul24_run_pair",
            first._handle,
            _address(first_bias),
            activation.encode(),
            self._handle,
            _address(bias),
            _address(residual),
            _address(x),
            ctypes.c_int64(tokens),
            _address(out),
            ctypes.c_int(threads),
        )
        return out

    def _check_call(
        self,
        x: NDArray[np.float32],
        depth: int,
        bias: NDArray[np.float32] | None,
        residual: NDArray[np.float32] | None,
        out: NDArray[np.float32] | None,
    ) -> tuple[int, NDArray[np.float32]]:
        """The number of tokens, and where to write."""
        tokens = x.shape[0] if x.ndim == 2 else -1
        out = np.empty((max(tokens, 0), self.rows), np.float32) if out is None else out
        _check("x", x, (tokens, depth))
        _check("out", out, (tokens, self.rows))
        if bias is not None:
            _check("bias", bias, (self.rows,))
        if residual is not None:
            _check("residual", residual, (tokens, self.rows))
        return tokens, out

    @property
    def tier(self) -> str:
        """The tier that computes it."""
        return str(_library().sparse_engine_matmul24_tier(self._handle).decode())

    @property
    def lanes(self) -> str:
        """What lies in the lanes."""
        return str(_library().sparse_engine_matmul24_lanes(self._handle).decode())

    @property
    def packed_bytes(self) -> int:
        """Memory of the packed weights."""
        return int(_library().sparse_engine_matmul24_packed_bytes(self._handle))

    def __del__(self) -> None:
        if self._handle:
            _library().sparse_engine_matmul24_destroy(self._handle)


@functools.cache
def _library() -> ctypes.CDLL:
    if not is_available():
        raise UnsupportedError(
            f"the CPU kernels are not built: {LIBRARY_PATH} does not exist",
            fix="install a wheel, or build with a C++17 compiler: cmake -S . -B build -G Ninja && cmake --build build",
        )
    library = ctypes.CDLL(str(LIBRARY_PATH))
    if library.sparse_engine_abi_version() != _ABI_VERSION:
        raise BackendError(f"{LIBRARY_PATH} belongs to another version of sparse-engine", fix="build it again")
    library.sparse_engine_matmul24_tier.restype = ctypes.c_char_p
    library.sparse_engine_matmul24_lanes.restype = ctypes.c_char_p
    library.sparse_engine_matmul24_packed_bytes.restype = ctypes.c_size_t
    library.sparse_engine_matmul24_destroy.restype = None
    library.sparse_engine_int8_tier.restype = ctypes.c_char_p
    library.sparse_engine_int8_packed_bytes.restype = ctypes.c_size_t
    library.sparse_engine_int8_destroy.restype = None
    library.sparse_engine_bf16_packed_bytes.restype = ctypes.c_size_t
    library.sparse_engine_bf16_destroy.restype = None
    library.sparse_engine_conv_int8_tier.restype = ctypes.c_char_p
    library.sparse_engine_conv_int8_destroy.restype = None
    return library


_ERRORS: dict[int, type[SparseEngineError]] = {1: InputError, 2: UnsupportedError, 3: BackendError}


def _call(function: str, *arguments: Any) -> None:
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    status = getattr(_library(), function)(*arguments, message, ctypes.c_size_t(_MESSAGE_BYTES))
    if status:
        raise _ERRORS[status](message.value.decode(errors="replace"))


def _address(array: NDArray[Any] | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def _check(name: str, array: NDArray[Any], shape: tuple[int, ...], kind: Any = np.float32) -> None:
    if array.dtype != kind or array.shape != shape or not array.flags.c_contiguous:
        layout = "" if array.flags.c_contiguous else ", not C-contiguous"
        expected = ["M" if size < 0 else size for size in shape]
        raise InputError(
            f"{name} is {array.dtype} {list(array.shape)}{layout}, expected C-contiguous {np.dtype(kind)} {expected}"
        )
