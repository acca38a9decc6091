"""Convolutions of every tier and lanes against float64: windows, sizes, guards, threads, batches."""

import ml_dtypes
import numpy as np
import pytest
from kernel_cases import TOLERANCE, random_weight, relative_error

from sparse_engine import kernels
from sparse_engine.errors import InputError, UnsupportedError
from sparse_engine.kernels.convolution import Conv24
from sparse_engine.kernels.packing import conv_as_matrix, matrix_as_conv

SAME = (1, 1, 1, 1)
# batch, channels, rows, height, width; taps, stride, padding (top, left, bottom, right), enlarged
CASES = {
    "rows of whole vectors": ((2, 8, 5, 16, 32), 3, 1, SAME, 1),
    "several rows a vector": ((5, 16, 33, 8, 8), 3, 1, SAME, 1),
    "several images a vector": ((9, 8, 20, 2, 2), 3, 1, SAME, 1),
    "one pixel": ((3, 4, 8, 1, 1), 3, 1, SAME, 1),
    "odd sizes": ((2, 8, 16, 7, 13), 3, 1, SAME, 1),
    "a row wider than a tile": ((1, 4, 3, 3, 200), 3, 1, SAME, 1),
    "narrower than its padding": ((2, 8, 8, 6, 3), 3, 1, (2, 2, 2, 4), 1),
    "without padding": ((1, 8, 8, 18, 18), 3, 1, (0, 0, 0, 0), 1),
    "stride 2, as diffusers pads": ((2, 8, 16, 17, 33), 3, 2, (0, 0, 1, 1), 1),
    "stride 2, both sides": ((2, 8, 16, 16, 16), 3, 2, SAME, 1),
    "enlarged": ((2, 8, 70, 8, 8), 3, 1, SAME, 2),
    "enlarged, odd": ((1, 4, 9, 5, 7), 3, 1, SAME, 2),
    "one tap": ((3, 36, 20, 9, 5), 1, 1, (0, 0, 0, 0), 1),
    "one tap, whole vectors": ((2, 32, 20, 16, 16), 1, 1, (0, 0, 0, 0), 1),
    "patches": ((2, 4, 24, 8, 12), 2, 2, (0, 0, 0, 0), 1),
    "anything": ((1, 8, 16, 30, 10), 5, 3, (2, 1, 0, 3), 2),
    "deep": ((1, 132, 17, 6, 6), 3, 1, SAME, 1),
}
LANES = ("t-lanes", "n-lanes", "r-lanes")


def tactics():
    if not kernels.is_available():
        return []
    tiers = kernels.available_tiers()
    return [(tier, lanes) for tier in tiers for lanes in LANES if lanes != "r-lanes" or tier == "avx512-bf16"]


@pytest.fixture(params=tactics(), ids="/".join)
def tactic(request):
    """Each (tier, lanes) that this machine runs."""
    return request.param


class Case:
    """A convolution and what goes with it."""

    def __init__(self, name, tactic):
        (batch, channels, rows, height, width), taps, self.stride, self.padding, self.upsample = CASES[name]
        rng = np.random.default_rng(len(name))
        self.tier, lanes = tactic
        self.weight = matrix_as_conv(random_weight(rng, rows, channels * taps * taps), (taps, taps))
        self.x = rng.standard_normal((batch, channels, height, width)).astype(np.float32)
        self.bias = rng.standard_normal(rows).astype(np.float32)
        self.image_bias = rng.standard_normal((batch, rows)).astype(np.float32)
        self.conv = Conv24(
            *kernels.pack(conv_as_matrix(self.weight)),
            kernel=(taps, taps),
            stride=self.stride,
            padding=self.padding,
            upsample=self.upsample,
            tier=self.tier,
            lanes=lanes,
        )
        self.sums = self.reference()
        self.residual = rng.standard_normal(self.sums.shape).astype(np.float32)

    def reference(self):
        """The sums in float64, of operands rounded as the tier rounds them."""
        x, weight = self.x, self.weight
        if self.tier == "avx512-bf16":
            x, weight = (a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in (x, weight))
        x = x.astype(np.float64).repeat(self.upsample, 2).repeat(self.upsample, 3)
        top, left, bottom, right = self.padding
        x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))
        seen = windows[:, :, :: self.stride, :: self.stride]
        return np.einsum("bchwij,ncij->bnhw", seen, weight.astype(np.float64), optimize=True)

    def expected(self):
        """With everything that is added, and no activation."""
        return self.sums + self.bias[:, None, None] + self.image_bias[:, :, None, None] + self.residual

    def run(self, **options):
        told = {"bias": self.bias, "image_bias": self.image_bias, "residual": self.residual}
        return self.conv(self.x, **(told | options))


@pytest.mark.parametrize("name", CASES)
def test_convolutions_match_float64(tactic, name):
    case = Case(name, tactic)
    assert relative_error(case.run(), case.expected()) < 4e-6  # of the rounded operands bf16 is exact too
    assert relative_error(case.conv(case.x), case.sums) < 4e-6


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu-tanh"])
def test_activations_come_before_the_residual(tactic, activation):
    case = Case("several rows a vector", tactic)
    plain = case.run(residual=None).astype(np.float64)
    product = kernels.MatMul24(*kernels.pack(np.eye(4, dtype=np.float32)), tier="scalar")
    flat = np.ascontiguousarray(plain.astype(np.float32).reshape(-1, 4))
    expected = product(flat, activation=activation).reshape(plain.shape) + case.residual
    assert relative_error(case.run(activation=activation), expected) < max(TOLERANCE[case.tier] / 10, 2e-6)


@pytest.mark.parametrize("name", CASES)
def test_an_image_depends_neither_on_threads_nor_on_the_others(tactic, name):
    case = Case(name, tactic)
    together = case.run()
    np.testing.assert_array_equal(case.run(threads=3), together)
    told = {"image_bias": case.image_bias[-1:], "residual": case.residual[-1:]}
    alone = case.conv(case.x[-1:], bias=case.bias, **told)
    np.testing.assert_array_equal(alone, together[-1:])


@pytest.mark.parametrize("at", ["begin", "end"])
@pytest.mark.parametrize(
    "name",
    [
        "rows of whole vectors",
        "several images a vector",
        "odd sizes",
        "a row wider than a tile",
        "stride 2, as diffusers pads",
        "enlarged, odd",
        "one tap",
        "anything",
    ],
)
def test_arrays_next_to_a_page_without_access(tactic, guarded_memory, name, at):
    case = Case(name, tactic)
    expected = case.run()
    case.x = guarded_memory.copy(case.x, at)
    told = {part: guarded_memory.copy(getattr(case, part), at) for part in ("bias", "image_bias", "residual")}
    out = guarded_memory.copy(np.zeros_like(case.residual), at)
    case.run(**told, out=out, threads=2)
    np.testing.assert_array_equal(out, expected)


def test_the_residual_may_be_the_output(tactic):
    case = Case("enlarged", tactic)
    expected = case.run()
    out = case.residual.copy()
    case.run(residual=out, out=out)
    np.testing.assert_array_equal(out, expected)


def test_a_matrix_and_its_convolution():
    weight = np.arange(2 * 8 * 3 * 2, dtype=np.float32).reshape(2, 8, 3, 2)
    matrix = conv_as_matrix(weight)
    np.testing.assert_array_equal(matrix_as_conv(matrix, (3, 2)), weight)
    np.testing.assert_array_equal(matrix[1, 4:8], weight[1, :4, 0, 1])  # four channels of the second tap
    with pytest.raises(InputError, match="C a multiple of 4"):
        conv_as_matrix(np.zeros((2, 3, 3, 3), np.float32))


def test_windows_that_are_none():
    packed = kernels.pack(np.zeros((4, 36), np.float32))
    for options, message in (
        ({"kernel": (0, 3)}, "kernel height is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"padding": (0, -1, 0, 0)}, "padding is -1"),
        ({"upsample": 9}, "upsample is 9"),
        ({"kernel": (2, 3)}, "expected a multiple of 4 x 6 taps"),
    ):
        with pytest.raises(InputError, match=message):
            Conv24(*packed, **options)
    with pytest.raises(UnsupportedError, match="in r-lanes are not computed on scalar"):
        Conv24(*packed, tier="scalar", lanes="r-lanes")


def test_images_that_do_not_fit():
    conv = Conv24(*kernels.pack(np.zeros((4, 36), np.float32)), padding=(0, 0, 0, 0))
    with pytest.raises(InputError, match="too small or too large for a window of 3 x 3"):
        conv(np.zeros((1, 4, 2, 5), np.float32))
    with pytest.raises(InputError, match="x is float32"):
        conv(np.zeros((1, 8, 5, 5), np.float32))
    with pytest.raises(InputError, match="residual is"):
        conv(np.zeros((1, 4, 5, 5), np.float32), residual=np.zeros((1, 4, 5, 5), np.float32))
