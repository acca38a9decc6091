"""Layers in 8 bits: exact sums on every tier, what is done to them, and what is refused."""

import math

import numpy as np
import pytest
from kernel_cases import AVX2, AVX512, defined_symbols, needs_compiler

from sparse_engine import kernels
from sparse_engine.errors import InputError, UnsupportedError
from sparse_engine.kernels.int8 import Codes, LayerNorm, MatMulInt8

TIERS = kernels.available_tiers("int8") if kernels.is_available() else ()
KINDS = ("2:4", "dense")
VNNI = [*AVX512, "-mavx512vnni", "-mavx512vbmi"]


@pytest.fixture(params=TIERS)
def tier(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def random_codes(rng, rows, depth, kind="2:4"):
    """Codes [N, K] of -127..127; groups of a 2:4 one keep two, one or none."""
    codes = rng.integers(-127, 128, (rows, depth // 4, 4))
    if kind == "2:4":
        kept = rng.choice([0, 1, 2, 2, 2], (rows, depth // 4, 1))
        codes[np.argsort(np.argsort(rng.random(codes.shape), axis=-1), axis=-1) >= kept] = 0
    return codes.reshape(rows, depth).astype(np.int8)


ONES = Codes(1.0, 0)


def create(codes, kind, tier=None, scales=None, x=ONES):
    """The layer of some codes; asserts that the tier asked for runs."""
    values, positions = kernels.pack_codes(codes) if kind == "2:4" else (codes, None)
    scales = np.ones(len(codes), np.float32) if scales is None else scales
    layer = MatMulInt8(values, scales, positions, x=x, tier=tier)
    assert tier is None or layer.tier == tier
    return layer


def exact(x, codes, zero=0):
    return (x.astype(np.int64) - zero) @ codes.astype(np.int64).T


def test_the_best_tier_is_the_one_with_kernels(monkeypatch):
    monkeypatch.delenv(kernels.ISA_VARIABLE, raising=False)
    assert TIERS[0] == "scalar"
    assert kernels.best_tier("int8") == TIERS[-1]


@pytest.mark.parametrize(
    "forced, best, floats",
    [
        ("avx2", "scalar", "avx2"),
        ("avx-vnni", "avx-vnni", "avx2"),
        ("avx512", "avx-vnni", "avx512"),
        ("avx512-vnni", "avx512-vnni", "avx512"),
        ("avx512-bf16", "avx512-vnni", "avx512"),
    ],
)
def test_the_environment_says_what_is_allowed(monkeypatch, forced, best, floats):
    if not {forced, best} <= {*kernels.available_tiers(), *TIERS}:
        pytest.skip(f"this machine lacks {forced} or {best}")
    monkeypatch.setenv(kernels.ISA_VARIABLE, forced)
    assert kernels.best_tier("int8") == best
    assert kernels.best_tier("fp32") == floats


def test_other_tiers_have_no_such_products_and_this_one_no_others():
    codes = random_codes(np.random.default_rng(0), 4, 4)
    for tier in set(kernels.available_tiers()) - set(TIERS):
        with pytest.raises(UnsupportedError, match=f"8-bit products are not computed on {tier}"):
            create(codes, "dense", tier)
    for tier in set(TIERS) - {"scalar"}:
        with pytest.raises(UnsupportedError, match=f"{tier} computes 8-bit products, and nothing else"):
            kernels.MatMul24(*kernels.pack(np.eye(4, dtype=np.float32)), tier=tier)


@pytest.mark.parametrize("tokens", range(1, 131))
def test_every_number_of_tokens(tier, kind, tokens):
    rng = np.random.default_rng(tokens)
    codes = random_codes(rng, 37, 140, kind)
    x = rng.integers(0, 256, (tokens, 140), np.uint8)
    found = create(codes, kind, tier, x=Codes(1.0, 77))(x, threads=1 + tokens % 3)
    np.testing.assert_array_equal(found, exact(x, codes, 77))


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 48, 95])
@pytest.mark.parametrize("depth", [4, 8, 60, 64, 68, 124, 128, 516])
def test_tails_of_rows_and_depth(tier, kind, rows, depth):
    rng = np.random.default_rng(rows * depth)
    codes = random_codes(rng, rows, depth, kind)
    x = rng.integers(0, 256, (19, depth), np.uint8)
    np.testing.assert_array_equal(create(codes, kind, tier)(x), exact(x, codes))


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_do_not_overflow_at_the_largest_depth(tier, kind, sign):
    depth = 65536
    codes = np.zeros((3, depth // 4, 4), np.int8)
    codes[..., : 2 if kind == "2:4" else 4] = sign * 127
    codes = codes.reshape(3, depth)
    for zero in (0, 255):
        x = np.full((9, depth), 255 - zero, np.uint8)
        found = create(codes, kind, tier, x=Codes(1.0, zero))(x)
        np.testing.assert_array_equal(found, exact(x, codes, zero).astype(np.float32))
        assert abs(found).max() == np.float32(127 * 255 * (depth // 2 if kind == "2:4" else depth))


def test_a_larger_depth_is_refused(tier):
    with pytest.raises(InputError, match="K is 65540, and 8-bit sums hold 65536 products at most"):
        create(np.zeros((1, 65540), np.int8), "dense", tier)


def reference(x, codes, scales, given, bias, activation, residual):
    y = (exact(x, codes, given.zero) * (scales.astype(np.float64) * given.scale)) + bias
    y = {
        "none": lambda: y,
        "gelu": lambda: y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2))),
        "gelu-tanh": lambda: y * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
        "silu": lambda: y / (1 + np.exp(-y)),
    }[activation]()
    return y + residual


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu-tanh", "silu"])
@pytest.mark.parametrize("step", [0.02, 5e-4])
def test_what_sums_become(tier, kind, activation, step):
    rng = np.random.default_rng(5)
    codes, given = random_codes(rng, 53, 196, kind), Codes(0.013, 91)
    scales = rng.uniform(1e-4, 3e-3, 53).astype(np.float32)
    x = rng.integers(0, 256, (29, 196), np.uint8)
    bias, residual = rng.standard_normal(53).astype(np.float32), rng.standard_normal((29, 53)).astype(np.float32)
    layer = create(codes, kind, tier, scales, given)
    for more in (np.zeros_like(residual), residual):
        expected = reference(x, codes, scales, given, bias, activation, more)
        told = {"bias": bias, "activation": activation, "residual": more if more.any() else None}
        assert abs(expected).max() > 2
        np.testing.assert_allclose(layer(x, **told), expected, rtol=0, atol=1e-6 * abs(expected).max())
        halves = (layer(x, out="bf16", **told).astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_allclose(halves, expected, rtol=0.005, atol=2e-3)
        y = Codes(step, 30)
        wanted = np.clip(np.rint(expected / step) + 30, 0, 255)
        found = layer(x, out="codes", y=y, **told).astype(int)
        assert abs(found - wanted).max() <= 1
        assert (found != wanted).mean() < 0.05


def test_codes_saturate_and_what_is_not_a_number_is_the_lowest(tier):
    layer = create(np.array([[127, 0, 0, 0], [-127, 0, 0, 0]], np.int8), "2:4", tier)
    x = np.full((2, 4), 255, np.uint8)
    np.testing.assert_array_equal(layer(x, out="codes", y=Codes(1e-9, 7)), [[255, 0]] * 2)
    residual = np.array([[np.inf, -np.inf], [np.nan, np.nan]], np.float32)
    np.testing.assert_array_equal(layer(x, residual=residual, out="codes", y=Codes(1.0)), [[255, 0], [0, 0]])


@pytest.mark.parametrize("depth", [4, 36, 64, 100, 512])
@pytest.mark.parametrize("affine", [False, True])
def test_floats_are_normalised_and_rounded(tier, depth, affine):
    rng = np.random.default_rng(depth)
    x = (rng.standard_normal((21, depth)) * 3 + 50).astype(np.float32)
    gamma, beta = (rng.standard_normal(depth).astype(np.float32) if affine else None for _ in range(2))
    given = Codes(0.02, 120)
    wide = x.astype(np.float64)
    wide = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    wide = wide * (1 if gamma is None else gamma) + (0 if beta is None else beta)
    expected = np.clip(np.rint(wide / given.scale) + given.zero, 0, 255)
    # A row for each k shows the codes themselves.
    layer = create(np.eye(depth, dtype=np.int8), "2:4", tier, x=given)
    found = layer(x, norm=LayerNorm(gamma, beta, 1e-5)) / np.float32(given.scale) + given.zero
    assert abs(found - expected).max() <= 1.001
    assert (abs(found - expected) > 0.5).mean() < 0.02
    plain = layer(x) / np.float32(given.scale) + given.zero
    np.testing.assert_allclose(plain, np.clip(np.rint(x / np.float32(given.scale)) + given.zero, 0, 255), atol=0.01)


@pytest.mark.parametrize("split", [4, 20, 64])
def test_two_parts_side_by_side_are_one_input(tier, split):
    rng = np.random.default_rng(split)
    x = rng.standard_normal((13, 96)).astype(np.float32)
    layer = create(random_codes(rng, 20, 96), "2:4", tier, x=Codes(0.03, 128))
    parts = (np.ascontiguousarray(part) for part in (x[:, :split], x[:, split:]))
    np.testing.assert_array_equal(layer(next(parts), beside=next(parts)), layer(x))


@pytest.mark.parametrize("tokens", [1, 8, 9, 131, 300])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_pair_gives_what_two_calls_give(tier, tokens, threads):
    rng = np.random.default_rng(tokens)
    given, between = Codes(0.03, 100), Codes(0.02, 9)
    scales = [rng.uniform(1e-3, 2e-3, rows).astype(np.float32) for rows in (132, 40)]
    first = create(random_codes(rng, 132, 68), "2:4", tier, scales[0], given)
    second = create(random_codes(rng, 40, 132), "2:4", tier, scales[1], between)
    x = rng.standard_normal((tokens, 68)).astype(np.float32)
    first_bias, bias = rng.standard_normal(132).astype(np.float32), rng.standard_normal(40).astype(np.float32)
    residual = rng.standard_normal((tokens, 40)).astype(np.float32)
    norm = LayerNorm(epsilon=1e-6)
    hidden = first(x, norm=norm, bias=first_bias, activation="gelu", out="codes", y=between)
    expected = second(hidden, bias=bias, residual=residual)
    told = {"norm": norm, "after": first, "after_bias": first_bias, "activation": "gelu", "bias": bias}
    np.testing.assert_array_equal(second(x, residual=residual, threads=threads, **told), expected)
    in_place = residual.copy()
    second(x, residual=in_place, buffer=in_place, threads=threads, **told)
    np.testing.assert_array_equal(in_place, expected)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_token_does_not_depend_on_the_others(tier, kind, activation):
    rng = np.random.default_rng(0)
    codes = random_codes(rng, 70, 200, kind)
    layer = create(codes, kind, tier, np.full(70, 1e-3, np.float32), Codes(0.02, 128))
    x = rng.standard_normal((131, 200)).astype(np.float32)
    for out in ("fp32", "bf16", "codes"):
        told = {"norm": LayerNorm(), "activation": activation, "out": out, "y": Codes(0.01, 20)}
        together = layer(x, **told)
        for begin, end in ((0, 1), (3, 10), (17, 26), (100, 131)):
            np.testing.assert_array_equal(layer(x[begin:end], **told), together[begin:end])


@pytest.mark.parametrize("at", ["begin", "end"])
@pytest.mark.parametrize("rows, depth, tokens", [(1, 4, 1), (37, 76, 19), (70, 192, 9)], ids=str)
def test_arrays_next_to_a_page_without_access(tier, kind, guarded_memory, rows, depth, tokens, at):
    rng = np.random.default_rng(rows)
    codes = random_codes(rng, rows, depth, kind)
    values, positions = kernels.pack_codes(codes) if kind == "2:4" else (codes, None)
    values, scales = guarded_memory.copy(values, at), guarded_memory.copy(np.ones(rows, np.float32), at)
    positions = None if positions is None else guarded_memory.copy(positions, at)
    layer = MatMulInt8(values, scales, positions, x=Codes(1.0, 3), tier=tier)
    x = guarded_memory.copy(rng.integers(0, 256, (tokens, depth), np.uint8), at)
    bias, gamma = (guarded_memory.copy(np.ones(size, np.float32), at) for size in (rows, depth))
    for out, dtype in (("fp32", np.float32), ("bf16", np.uint16), ("codes", np.uint8)):
        residual = guarded_memory.copy(np.ones((tokens, rows), np.float32), at)
        buffer = guarded_memory.copy(np.zeros((tokens, rows), dtype), at)
        layer(x, bias=bias, residual=residual, out=out, buffer=buffer, threads=2)
        if out == "fp32":
            np.testing.assert_array_equal(buffer, exact(x, codes, 3) + 2)
        floats = guarded_memory.copy(rng.standard_normal((tokens, depth)).astype(np.float32), at)
        layer(floats, norm=LayerNorm(gamma, gamma), out=out, buffer=buffer)


def test_neighbours_of_the_output_are_left_alone(tier, kind):
    layer = create(random_codes(np.random.default_rng(0), 29, 64, kind), kind, tier)
    for out, dtype in (("fp32", np.float32), ("bf16", np.uint16), ("codes", np.uint8)):
        canvas = np.full(16 + 23 * 29 + 16, 7, dtype)
        layer(np.ones((23, 64), np.uint8), out=out, buffer=canvas[16:-16].reshape(23, 29))
        assert (canvas[:16] == 7).all()
        assert (canvas[-16:] == 7).all()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"scales": np.zeros(4, np.float32)}, "the scale of row 0 is 0.0*, expected a finite number above 0"),
        ({"scales": np.ones(3, np.float32)}, r"scales is float32 \[3\], expected C-contiguous float32 \[4\]"),
        ({"values": np.ones((4, 4), np.float32)}, "values are float32"),
        ({"positions": np.zeros((4, 2), np.uint8)}, "positions of row 0, group 0 are 0"),
        ({"x": Codes(1.0, 256)}, "zero point 256, expected above 0, and 0 to 255"),
        ({"x": Codes(float("nan"))}, "codes of X have scale nan"),
    ],
)
def test_layers_that_are_none_are_refused(changed, message):
    values, positions = kernels.pack_codes(random_codes(np.random.default_rng(0), 4, 8))
    told = {"values": values, "scales": np.ones(4, np.float32), "positions": positions, "x": Codes(1.0), **changed}
    with pytest.raises(InputError, match=message):
        MatMulInt8(told["values"], told["scales"], told["positions"], x=told["x"])


def test_calls_that_do_not_fit_are_refused():
    layer = create(random_codes(np.random.default_rng(0), 4, 8), "2:4")
    x, codes = np.zeros((3, 8), np.float32), np.zeros((3, 8), np.uint8)
    with pytest.raises(InputError, match=r"x is float32 \[3, 4\], expected C-contiguous float32 \[3, 8\]"):
        layer(x[:, :4].copy())
    with pytest.raises(InputError, match=r"buffer is float32 \[3, 4\], expected C-contiguous uint8 \[3, 4\]"):
        layer(x, out="codes", buffer=np.zeros((3, 4), np.float32))
    with pytest.raises(InputError, match="codes are neither normalised nor put beside floats"):
        layer(codes, norm=LayerNorm())
    with pytest.raises(InputError, match="the output is 'fp16', expected one of: fp32, bf16, codes"):
        layer(x, out="fp16")
    with pytest.raises(InputError, match="the first layer has N = 4, the second K = 8; expected the same"):
        layer(x, after=layer)


def test_the_peak_is_plausible():
    if "avx512-vnni" in TIERS:
        assert 1e9 < kernels.peak_flops("avx512-vnni") < 1e13


@needs_compiler
@pytest.mark.parametrize("source, flags, count", [("tier_avx512_vnni.cpp", VNNI, 2), ("tier_avx_vnni.cpp", AVX2, 1)])
def test_an_instruction_set_shares_no_code_with_the_others(tmp_path, source, flags, count):
    found = defined_symbols(source, flags, tmp_path)
    assert len(found) == count, "the kernels, of AVX-512 a peak loop, and nothing else"
