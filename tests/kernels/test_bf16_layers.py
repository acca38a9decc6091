"""Layers in bf16 with what surrounds them (R-lanes): to the bit where rounding is all that may differ, else float64."""

import ml_dtypes
import numpy as np
import pytest
from kernel_cases import AVX512_BF16, create, defined_symbols, needs_compiler, random_weight, relative_error

from sparse_engine import kernels
from sparse_engine.errors import InputError, UnsupportedError
from sparse_engine.kernels.int8 import LayerNorm

needs_bf16 = pytest.mark.skipif(
    not kernels.is_available() or "avx512-bf16" not in kernels.available_tiers(),
    reason="this machine has no AVX512-BF16",
)
N_LANES = ("avx512-bf16", "n-lanes")
KINDS = ["2:4", "dense"]


def rounded(array):
    """Floats that are bfloat16."""
    return np.asarray(array, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def halves(array):
    """bfloat16, as bits."""
    return np.asarray(array, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def floats(bits):
    return bits.view(ml_dtypes.bfloat16).astype(np.float32)


def a_layer(rng, rows, depth, kind="2:4"):
    """A weight, and it as a layer."""
    weight = random_weight(rng, rows, depth, depth**-0.5)
    if kind == "2:4":
        return weight, kernels.MatMulBf16(*kernels.pack(weight))
    weight = (rng.standard_normal((rows, depth)) * depth**-0.5).astype(np.float32)
    return weight, kernels.MatMulBf16(weight)


def exact(x, weight):
    """The product of operands rounded to bfloat16, in float64."""
    return rounded(x).astype(np.float64) @ rounded(weight).astype(np.float64).T


@needs_bf16
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, depth", [(1, 4), (16, 64), (37, 76), (33, 132), (129, 516), (80, 1032), (65, 2048)])
def test_products_match_float64(kind, rows, depth):
    rng = np.random.default_rng(rows)
    weight, layer = a_layer(rng, rows, depth, kind)
    for tokens in (1, 7, 97, 260):
        x = rng.standard_normal((tokens, depth)).astype(np.float32)
        assert relative_error(layer(x), exact(x, weight)) < 4e-6


@needs_bf16
@pytest.mark.parametrize("rows, depth", [(37, 140), (64, 64), (31, 4), (512, 516)])
def test_the_bits_are_those_of_n_lanes(rows, depth):
    rng = np.random.default_rng(rows)
    weight, layer = a_layer(rng, rows, depth)
    x = rng.standard_normal((70, depth)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    residual = rng.standard_normal((70, rows)).astype(np.float32)
    expected = create(weight, N_LANES)(x, bias=bias, activation="gelu", residual=residual)
    np.testing.assert_array_equal(layer(x, bias=bias, activation="gelu", residual=residual), expected)


@needs_bf16
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_has_its_bits_whatever_is_beside_it(kind):
    rng = np.random.default_rng(1)
    _, layer = a_layer(rng, 37, 140, kind)
    x = rng.standard_normal((290, 140)).astype(np.float32)
    norm = LayerNorm(*(rng.standard_normal(140).astype(np.float32) for _ in range(2)))
    whole = layer(x, norm=norm, threads=3)
    for tokens in [*range(1, 131), 257, 289]:
        part = layer(x[290 - tokens :], norm=norm, threads=1 + tokens % 2)
        np.testing.assert_array_equal(part, whole[290 - tokens :], f"{tokens} tokens")


@needs_bf16
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 95])
def test_odd_numbers_of_rows_as_floats_and_bfloat16(kind, rows):
    rng = np.random.default_rng(rows)
    weight, layer = a_layer(rng, rows, 68, kind)
    x = rng.standard_normal((21, 68)).astype(np.float32)
    canvas = np.full((23, rows), 7, np.uint16)
    result = layer(x)
    assert relative_error(result, exact(x, weight)) < 4e-6
    layer(x, out="bf16", buffer=canvas[1:-1])
    np.testing.assert_array_equal(canvas[1:-1], halves(result))
    assert (canvas[[0, -1]] == 7).all()


@needs_bf16
def test_halves_and_parts_are_as_floats_that_are_rounded():
    rng = np.random.default_rng(2)
    _, layer = a_layer(rng, 40, 100)
    x = rng.standard_normal((30, 100)).astype(np.float32)
    expected = layer(x)
    np.testing.assert_array_equal(layer(halves(x)), expected)
    for cut in (4, 33, 64, 97):
        np.testing.assert_array_equal(layer(x[:, :cut].copy(), beside=x[:, cut:].copy()), expected, f"{cut}")


def normalised(x, norm):
    """In float64."""
    x = x.astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.epsilon)
    x = x if norm.gamma is None else x * norm.gamma
    return x if norm.beta is None else x + norm.beta


@needs_bf16
@pytest.mark.parametrize("given", [(), ("gamma",), ("beta",), ("gamma", "beta")])
@pytest.mark.parametrize("depth", [4, 20, 64, 516])
def test_a_normalisation_before_it(given, depth):
    rng = np.random.default_rng(depth)
    weight, layer = a_layer(rng, 24, depth, "dense")
    x = (rng.standard_normal((19, depth)) * 3 + 20).astype(np.float32)
    norm = LayerNorm(**{name: rng.standard_normal(depth).astype(np.float32) for name in given})
    expected = exact(normalised(x, norm), weight)
    # A number next to the middle of two bfloat16 may be rounded to the other one.
    assert relative_error(layer(x, norm=norm), expected) < 4e-3


GELU = {"gelu": 2e-4, "gelu-tanh": 2e-4, "silu": 2e-4, "none": 4e-6}


def activated(name, x):
    from scipy.special import erf

    if name == "gelu":
        return x * 0.5 * (1 + erf(x / np.sqrt(2)))
    if name == "gelu-tanh":
        return x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-x)) if name == "silu" else x


@needs_bf16
@pytest.mark.parametrize("activation", GELU)
def test_epilogues(activation):
    pytest.importorskip("scipy")
    rng = np.random.default_rng(3)
    weight, layer = a_layer(rng, 50, 64)
    x = (rng.standard_normal((33, 64)) * 4).astype(np.float32)
    bias = rng.standard_normal(50).astype(np.float32)
    residual = rng.standard_normal((33, 50)).astype(np.float32)
    expected = activated(activation, exact(x, weight) + bias) + residual
    result = layer(x, bias=bias, activation=activation, residual=residual)
    assert np.abs(result - expected).max() < GELU[activation] + 4e-6 * np.abs(expected).max()
    short = floats(layer(x, bias=bias, activation=activation, residual=residual, out="bf16"))
    assert (np.abs(short - expected) <= GELU[activation] + np.abs(expected) * 2**-8).all()
    np.testing.assert_array_equal(
        layer(x, bias=bias, activation=activation, residual=residual, buffer=residual), result
    )


@needs_bf16
@pytest.mark.parametrize("tokens", [1, 8, 90, 130, 257])
@pytest.mark.parametrize("kinds", [("2:4", "2:4", "2:4"), ("dense", "2:4", "dense")], ids=["2:4", "mixed"])
def test_layers_in_a_row_have_the_bits_of_single_ones(tokens, kinds):
    rng = np.random.default_rng(tokens)
    front, first, last = (
        a_layer(rng, rows, depth, kind)[1]
        for (rows, depth), kind in zip([(64, 36), (132, 64), (64, 132)], kinds, strict=True)
    )
    front_bias, bias, after_bias = (rng.standard_normal(n).astype(np.float32) for n in (64, 64, 132))
    norm = LayerNorm(*(rng.standard_normal(64).astype(np.float32) for _ in range(2)))
    x, residual = (rng.standard_normal((tokens, n)).astype(np.float32) for n in (36, 64))
    before = front(x, bias=front_bias, residual=residual)
    hidden = first(before, norm=norm, bias=after_bias, activation="gelu", out="bf16")
    expected = last(hidden, bias=bias, residual=before)
    told = {"after": first, "after_bias": after_bias, "activation": "gelu", "norm": norm, "bias": bias}
    for threads in (1, 2, 5):
        pair = last(before, residual=before, threads=threads, **told)
        np.testing.assert_array_equal(pair, expected)
        told_of_front = {"front": front, "front_bias": front_bias, "front_residual": residual}
        for given in (x, halves(x)):
            np.testing.assert_array_equal(last(given, threads=threads, **told, **told_of_front), expected)
    short = last(x, out="bf16", **told, **told_of_front)
    np.testing.assert_array_equal(short, halves(expected))


@needs_bf16
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, depth, tokens", [(1, 4, 1), (37, 76, 19), (48, 68, 97), (64, 320, 130)], ids=str)
@pytest.mark.parametrize("at", ["begin", "end"])
def test_arrays_next_to_a_page_without_access(guarded_memory, kind, rows, depth, tokens, at):
    rng = np.random.default_rng(rows)
    weight, _ = a_layer(rng, rows, depth, kind)
    parts = kernels.pack(weight) if kind == "2:4" else (weight,)
    layer = kernels.MatMulBf16(*(guarded_memory.copy(a, at) for a in parts))
    x = rng.standard_normal((tokens, depth)).astype(np.float32)
    bias, gamma, beta = (
        guarded_memory.copy(rng.standard_normal(n).astype(np.float32), at) for n in (rows, depth, depth)
    )
    residual = guarded_memory.copy(rng.standard_normal((tokens, rows)).astype(np.float32), at)
    expected = layer(x, bias=bias, residual=residual)
    out = guarded_memory.copy(np.zeros((tokens, rows), np.float32), at)
    short = guarded_memory.copy(np.zeros((tokens, rows), np.uint16), at)
    layer(guarded_memory.copy(x, at), bias=bias, residual=residual, buffer=out, threads=2)
    np.testing.assert_array_equal(out, expected)
    layer(guarded_memory.copy(halves(x), at), bias=bias, residual=residual, buffer=short, out="bf16")
    np.testing.assert_array_equal(short, halves(expected))
    if depth > 4:
        cut = [guarded_memory.copy(part.copy(), at) for part in (x[:, :9], x[:, 9:])]
        layer(cut[0], beside=cut[1], bias=bias, residual=residual, buffer=out)
        np.testing.assert_array_equal(out, expected)
    layer(guarded_memory.copy(x, at), norm=LayerNorm(gamma, beta), buffer=out)
    assert np.isfinite(out).all()


@needs_bf16
def test_calls_that_do_not_fit_are_refused():
    rng = np.random.default_rng(4)
    (_, first), (_, second) = a_layer(rng, 32, 16), a_layer(rng, 16, 36)
    x = np.zeros((3, 16), np.float32)
    with pytest.raises(InputError, match=r"x is float32 \[3, 16\], expected C-contiguous float32 \[3, 36\]"):
        second(x)
    with pytest.raises(InputError, match="the first layer has N = 32, the second K = 36; expected the same"):
        second(x, after=first)
    front, last = a_layer(rng, 16, 16)[1], a_layer(rng, 8, 32)[1]
    with pytest.raises(InputError, match="the front has N = 16, the last layer N = 8; expected the same"):
        last(x, after=first, front=front)
    with pytest.raises(InputError, match="bfloat16 is neither normalised"):
        first(halves(x), norm=LayerNorm())
    with pytest.raises(InputError, match="a front comes before two layers"):
        first(x, front=front)
    with pytest.raises(InputError, match="layers in bf16 give no codes"):
        first(x, out="codes")
    with pytest.raises(InputError, match=r"expected float32 \[N, K\]"):
        kernels.MatMulBf16(np.zeros((4, 4)))
    values, positions = kernels.pack(random_weight(rng, 4, 8))
    with pytest.raises(InputError, match="row 1, group 0"):
        kernels.MatMulBf16(values, np.where(np.arange(4)[:, None] == 1, np.uint8(1), positions))


def test_a_tier_without_bf16_has_no_such_layers(monkeypatch):
    monkeypatch.setenv("SPARSE_ENGINE_ISA", "scalar")
    with pytest.raises(UnsupportedError, match="bf16 products need AVX512-BF16"):
        kernels.MatMulBf16(np.zeros((4, 4), np.float32))


@needs_bf16
def test_layers_that_come_and_go_do_not_leak(resident_bytes):
    packed = kernels.pack(random_weight(np.random.default_rng(0), 512, 512))
    x = np.ones((130, 512), np.float32)

    def round_trip():
        layer = kernels.MatMulBf16(*packed)
        layer(x, after=layer, threads=2)

    for _ in range(20):
        round_trip()
    before = resident_bytes()
    for _ in range(200):
        round_trip()
    assert resident_bytes() - before < 20e6


@needs_compiler
def test_the_file_shares_nothing_with_others(tmp_path):
    assert defined_symbols("layers_avx512_bf16.cpp", AVX512_BF16, tmp_path) == ["sparse_engine::kAvx512Bf16Layers"]
