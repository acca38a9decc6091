"""Bias, activation and residual, fused behind the product."""

import math

import numpy as np
import pytest
from kernel_cases import create, relative_error

from sparse_engine.errors import InputError


def gelu(x):
    return x * 0.5 * np.vectorize(math.erfc)(-x / math.sqrt(2))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x * 0.5 * (1 + np.tanh(x / 2))


# A GELU after bf16 products is fitted as closely as they deserve, all else as closely as fp32 does.
COARSE_GELU = 2e-4

REFERENCE = {"none": lambda x: x, "gelu": gelu, "gelu-tanh": gelu_tanh, "silu": silu}


def tolerance(tactic, activation):
    return COARSE_GELU if tactic[0] == "avx512-bf16" and activation == "gelu" else 1e-6


def identity(size):
    """A 2:4 weight that copies its input, so that the epilogue is seen alone."""
    return np.eye(size, dtype=np.float32)


@pytest.mark.parametrize("activation", REFERENCE)
@pytest.mark.parametrize("span", [0.01, 3.0, 100.0])
def test_activations_match_float64(tactic, activation, span):
    x = np.linspace(-span, span, 64 * 64, dtype=np.float32).reshape(64, 64)
    # Eight bits of mantissa, so that bf16 carries them exactly.
    x = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    result = create(identity(64), tactic)(x, activation=activation)
    assert relative_error(result, REFERENCE[activation](x.astype(np.float64))) < tolerance(tactic, activation)


def test_the_negative_tail_of_gelu_keeps_its_digits(tactic):
    x = -np.linspace(3, 8, 32, dtype=np.float32).repeat(32).reshape(32, 32)
    x = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    result = create(identity(32), tactic)(x, activation="gelu")
    np.testing.assert_allclose(
        result, gelu(x.astype(np.float64)), rtol=COARSE_GELU if tactic[0] == "avx512-bf16" else 2e-5
    )


@pytest.mark.parametrize("activation", REFERENCE)
@pytest.mark.parametrize("tokens", [3, 50])
def test_bias_comes_before_and_residual_after_the_activation(tactic, activation, tokens):
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(36).astype(np.float32)
    residual = rng.standard_normal((tokens, 36)).astype(np.float32)
    x = np.zeros((tokens, 36), np.float32)
    result = create(identity(36), tactic)(x, bias=bias, residual=residual, activation=activation)
    expected = REFERENCE[activation](bias.astype(np.float64)) + residual
    assert relative_error(result, expected) < tolerance(tactic, activation)


def test_residual_may_be_the_output(tactic):
    x = np.ones((40, 36), np.float32)
    out = np.arange(40 * 36, dtype=np.float32).reshape(40, 36)
    expected = out + 1
    assert create(identity(36), tactic)(x, residual=out, out=out) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"x": np.zeros((3, 35), np.float32)}, r"x is float32 \[3, 35\], expected .* \[3, 36\]"),
        ({"x": np.zeros((3, 36))}, "x is float64"),
        ({"x": np.zeros((36, 3), np.float32).T}, "not C-contiguous"),
        ({"bias": np.zeros(35, np.float32)}, r"bias is float32 \[35\]"),
        ({"residual": np.zeros((2, 36), np.float32)}, r"residual is float32 \[2, 36\]"),
        ({"out": np.zeros((3, 37), np.float32)}, r"out is float32 \[3, 37\]"),
        ({"activation": "relu"}, "activation is 'relu', expected one of: none, gelu, gelu-tanh, silu"),
    ],
    ids=["depth", "dtype", "layout", "bias", "residual", "out", "activation"],
)
def test_wrong_arguments_are_refused(arguments, message):
    product = create(identity(36), ("scalar", "t-lanes"))
    with pytest.raises(InputError, match=message):
        product(**{"x": np.zeros((3, 36), np.float32), **arguments})
