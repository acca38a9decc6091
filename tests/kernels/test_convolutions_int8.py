"""Convolutions in 8 bits: exact sums on every tier, what is done to them, codes of group norms, and what is refused."""

import math

import numpy as np
import pytest
from kernel_cases import AVX2, AVX512, defined_symbols, needs_compiler

from sparse_engine import kernels
from sparse_engine.errors import InputError, UnsupportedError
from sparse_engine.kernels.convolution_int8 import ConvInt8
from sparse_engine.kernels.int8 import Codes

TIERS = kernels.available_tiers("int8") if kernels.is_available() else ()

# (batch, channels, rows, height, width), kernel, stride, padding (top, left, bottom, right), upsample
CASES = [
    ((2, 8, 21, 5, 32), (3, 3), 1, (1, 1, 1, 1), 1),
    ((3, 64, 37, 8, 8), (3, 3), 1, (1, 1, 1, 1), 1),  # a whole register of channels
    ((9, 68, 20, 2, 2), (3, 3), 1, (1, 1, 1, 1), 1),  # and four more; several images a tile
    ((3, 4, 8, 1, 1), (3, 3), 1, (1, 1, 1, 1), 1),  # nothing but border
    ((2, 20, 16, 7, 13), (3, 3), 1, (1, 1, 1, 1), 1),  # odd sizes
    ((1, 4, 3, 3, 200), (3, 3), 1, (1, 1, 1, 1), 1),  # rows wider than a tile
    ((2, 8, 8, 6, 3), (3, 3), 1, (2, 2, 2, 4), 1),  # narrower than its padding
    ((2, 36, 16, 17, 33), (3, 3), 2, (0, 0, 1, 1), 1),  # stride 2, padded below and right
    ((2, 132, 33, 6, 6), (3, 3), 2, (1, 1, 1, 1), 1),
    ((1, 12, 66, 5, 7), (3, 3), 1, (1, 1, 1, 1), 2),  # enlarged
    ((3, 128, 20, 9, 5), (1, 1), 1, (0, 0, 0, 0), 1),  # one tap
    ((2, 28, 7, 6, 5), (1, 1), 2, (0, 0, 0, 0), 1),
    ((1, 8, 16, 11, 10), (5, 4), 3, (2, 1, 0, 3), 2),  # anything
]


@pytest.fixture(params=TIERS)
def tier(request):
    return request.param


def random_weight(rng, rows, channels, kernel):
    """Codes [N, C, kh, kw] of -127..127, whose groups of four channels keep two, one or none."""
    codes = rng.integers(-127, 128, (rows, channels // 4, 4, *kernel))
    kept = rng.choice([0, 1, 2, 2, 2], (rows, channels // 4, 1, *kernel))
    codes[np.argsort(np.argsort(rng.random(codes.shape), axis=2), axis=2) >= kept] = 0
    return codes.reshape(rows, channels, *kernel).astype(np.int8)


def create(weight, tier, x, scales=None, **window):
    scales = np.ones(len(weight), np.float32) if scales is None else scales
    values, positions = kernels.pack_codes(kernels.packing.conv_as_matrix(weight))
    conv = ConvInt8(values, scales, positions, x=x, kernel=weight.shape[2:], tier=tier, **window)
    assert conv.tier == tier
    return conv


def exact(codes, zero, weight, stride, padding, upsample):
    """The integers, [B, N, H', W']: of codes [B, H, W, C]."""
    x = (codes.astype(np.int64) - zero).transpose(0, 3, 1, 2).repeat(upsample, 2).repeat(upsample, 3)
    top, left, bottom, right = padding
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("bchwyx,ncyx->bnhw", windows, weight.astype(np.int64))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("zero", [0, 77, 255])
def test_sums_are_exact_at_the_border_too(tier, case, zero):
    (batch, channels, rows, height, width), kernel, stride, padding, upsample = case
    rng = np.random.default_rng(rows * width)
    weight = random_weight(rng, rows, channels, kernel)
    codes = rng.integers(0, 256, (batch, height, width, channels), np.uint8)
    conv = create(weight, tier, Codes(1.0, zero), stride=stride, padding=padding, upsample=upsample)
    expected = exact(codes, zero, weight, stride, padding, upsample)
    assert abs(expected).max() < 1 << 24  # what floats hold
    floats = codes.transpose(0, 3, 1, 2).astype(np.float32) - np.float32(zero)
    floats += rng.uniform(-0.4, 0.4, floats.shape).astype(np.float32)  # rounded to the same codes
    for threads in (1, 2, 3):
        np.testing.assert_array_equal(conv(codes, threads=threads), expected)
        np.testing.assert_array_equal(conv(np.ascontiguousarray(floats), threads=threads), expected)


@pytest.mark.parametrize("width", [*range(1, 34), 95, 96, 97, 100])
def test_every_number_of_pixels(tier, width):
    rng = np.random.default_rng(width)
    weight = random_weight(rng, 17, 8, (2, 3))
    codes = rng.integers(0, 256, (3, 2, width, 8), np.uint8)
    conv = create(weight, tier, Codes(1.0, 9), padding=(0, 1, 1, 1))
    np.testing.assert_array_equal(conv(codes), exact(codes, 9, weight, 1, (0, 1, 1, 1), 1))


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_do_not_overflow_at_the_largest_depth(tier, sign):
    weight = np.zeros((3, 16384, 2, 2), np.int8)
    weight.reshape(3, -1, 4, 4)[:, :, :2] = sign * 127
    codes = np.full((1, 2, 3, 16384), 255, np.uint8)
    conv = create(weight, tier, Codes(1.0, 0), padding=(0, 0, 0, 0))
    expected = exact(codes, 0, weight, 1, (0, 0, 0, 0), 1)
    assert abs(expected).max() == 127 * 255 * 32768
    np.testing.assert_array_equal(conv(codes), expected.astype(np.float32))


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu-tanh", "silu"])
def test_what_sums_become(tier, activation):
    rng = np.random.default_rng(3)
    weight, given = random_weight(rng, 37, 36, (3, 3)), Codes(0.013, 91)
    codes = rng.integers(0, 256, (2, 7, 6, 36), np.uint8)
    scales = rng.uniform(1e-4, 3e-3, 37).astype(np.float32)
    bias, image_bias = (rng.standard_normal(shape).astype(np.float32) for shape in (37, (2, 37)))
    residual = rng.standard_normal((2, 37, 7, 6)).astype(np.float32)
    y = exact(codes, 91, weight, 1, (1, 1, 1, 1), 1) * (scales.astype(np.float64) * given.scale)[:, None, None]
    y += bias[:, None, None] + image_bias[:, :, None, None]
    y = {
        "none": lambda: y,
        "gelu": lambda: y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2))),
        "gelu-tanh": lambda: y * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
        "silu": lambda: y / (1 + np.exp(-y)),
    }[activation]()
    expected = y + residual
    conv = create(weight, tier, given, scales)
    out = residual.copy()
    conv(codes, bias=bias, image_bias=image_bias, residual=out, activation=activation, out=out, threads=2)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6 * abs(expected).max())


def test_an_image_does_not_depend_on_its_batch(tier):
    rng = np.random.default_rng(4)
    conv = create(random_weight(rng, 40, 20, (3, 3)), tier, Codes(0.02, 100), np.full(40, 1e-3, np.float32))
    x = rng.standard_normal((5, 20, 9, 7)).astype(np.float32)
    together = conv(x, threads=2, activation="silu")
    for image in range(5):
        np.testing.assert_array_equal(conv(x[image : image + 1], activation="silu"), together[image : image + 1])


@pytest.mark.parametrize("channels, groups", [(8, 2), (36, 3), (64, 32), (68, 17)])
@pytest.mark.parametrize("area", [(1, 1), (5, 7), (8, 8), (9, 16)])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_a_group_norm_gives_the_codes_of_its_output(tier, channels, groups, area, activation):
    rng = np.random.default_rng(channels)
    x = (rng.standard_normal((3, channels, *area)) * 2 + 7).astype(np.float32)
    gamma, beta = (rng.standard_normal(channels).astype(np.float32) for _ in range(2))
    scale, shift = (rng.standard_normal((3, channels)).astype(np.float32) for _ in range(2))
    told = {"gamma": gamma, "beta": beta, "scale": scale, "shift": shift, "activation": activation}
    floats = kernels.group_norm(x, groups, **told)
    codes = Codes(0.031, 60)
    expected = np.clip(np.rint(floats.transpose(0, 2, 3, 1) / np.float32(codes.scale)) + codes.zero, 0, 255)
    for threads in (1, 2):
        found = kernels.group_norm(x, groups, **told, codes=codes, codes_tier=tier, threads=threads)
        assert found.dtype == np.uint8
        assert abs(found - expected).max() <= 1
        assert (found != expected).mean() < 0.01
        np.testing.assert_array_equal(
            kernels.group_norm(x[1:2], groups, **_of(told, 1), codes=codes, codes_tier=tier), found[1:2]
        )


def _of(told, image):
    return {name: value[image : image + 1] if name in ("scale", "shift") else value for name, value in told.items()}


@pytest.mark.parametrize("at", ["begin", "end"])
@pytest.mark.parametrize("channels", [4, 20, 64, 72])
def test_arrays_next_to_a_page_without_access(tier, guarded_memory, at, channels):
    rng = np.random.default_rng(channels)
    weight = random_weight(rng, 19, channels, (3, 3))
    values, positions = kernels.pack_codes(kernels.packing.conv_as_matrix(weight))
    values, positions = guarded_memory.copy(values, at), guarded_memory.copy(positions, at)
    scales = guarded_memory.copy(np.ones(19, np.float32), at)
    conv = ConvInt8(values, scales, positions, x=Codes(1.0, 50), tier=tier)
    codes = guarded_memory.copy(rng.integers(0, 256, (2, 5, 7, channels), np.uint8), at)
    floats = codes.transpose(0, 3, 1, 2).astype(np.float32) - np.float32(50)
    floats = guarded_memory.copy(np.ascontiguousarray(floats), at)
    bias, image_bias, residual = (
        guarded_memory.copy(np.ones(shape, np.float32), at) for shape in (19, (2, 19), (2, 19, 5, 7))
    )
    out = guarded_memory.copy(np.zeros((2, 19, 5, 7), np.float32), at)
    expected = exact(codes, 50, weight, 1, (1, 1, 1, 1), 1) + 3
    for x in (codes, floats):
        conv(x, bias=bias, image_bias=image_bias, residual=residual, out=out, threads=2)
        np.testing.assert_array_equal(out, expected)
    kernels.group_norm(floats, channels // 4, codes=(0.1, 3), codes_tier=tier)


def test_what_is_refused(tier):
    rng = np.random.default_rng(0)
    weight = random_weight(rng, 4, 8, (3, 3))
    conv = create(weight, tier, Codes(1.0))
    with pytest.raises(InputError, match=r"x is float32 \[2, 8\], expected float32 \[B, C, H, W\] or uint8"):
        conv(np.zeros((2, 8), np.float32))
    with pytest.raises(InputError, match=r"x is uint8 \[1, 5, 5, 4\], expected C-contiguous uint8 \[1, 5, 5, 8\]"):
        conv(np.zeros((1, 5, 5, 4), np.uint8))
    with pytest.raises(InputError, match="images of 1 x 1 are too small or too large for a window of 3 x 3"):
        create(weight, tier, Codes(1.0), padding=(0, 0, 0, 0))(np.zeros((1, 1, 1, 8), np.uint8))
    with pytest.raises(InputError, match="the scale of row 1 is 0.000000, expected a finite number above 0"):
        create(weight, tier, Codes(1.0), np.float32([1, 0, 1, 1]))
    with pytest.raises(InputError, match="zero point 256, expected above 0, and 0 to 255"):
        create(weight, tier, Codes(1.0, 256))
    with pytest.raises(InputError, match="stride is 0, expected 1 to 64"):
        create(weight, tier, Codes(1.0), stride=0)
    with pytest.raises(InputError, match="K is 65544, and 8-bit sums hold 65536 products at most"):
        create(np.zeros((1, 65544, 1, 1), np.int8), tier, Codes(1.0))


def test_other_tiers_have_none():
    weight = random_weight(np.random.default_rng(0), 4, 8, (3, 3))
    for tier in set(kernels.available_tiers()) - set(TIERS):
        with pytest.raises(UnsupportedError, match=f"8-bit convolutions are not computed on {tier}"):
            create(weight, tier, Codes(1.0))


@needs_compiler
@pytest.mark.parametrize(
    "source, flags",
    [
        ("conv_int8_avx_vnni.cpp", AVX2),
        ("conv_int8_avx512_vnni.cpp", [*AVX512, "-mavx512vnni", "-mavx512vbmi"]),
    ],
)
def test_an_instruction_set_shares_no_code_with_the_others(tmp_path, source, flags):
    assert len(defined_symbols(source, flags, tmp_path)) == 1, "the tactic, and nothing else"
