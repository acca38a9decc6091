"""Every tactic of this machine against float64."""

import ml_dtypes
import numpy as np
import pytest
from kernel_cases import TOLERANCE, create, random_weight, relative_error

SHAPES = [(1, 4), (16, 64), (37, 76), (33, 132), (129, 516), (80, 1032), (65, 2048)]


def reference(x, weight, tier):
    """x @ weight.T in float64, of operands rounded as the tier rounds them."""
    if tier == "avx512-bf16":
        x, weight = (a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in (x, weight))
    return x.astype(np.float64) @ weight.astype(np.float64).T


@pytest.mark.parametrize("rows, depth", SHAPES, ids=str)
def test_products_match_float64(tactic, rows, depth):
    rng = np.random.default_rng(rows)
    weight = random_weight(rng, rows, depth)
    product = create(weight, tactic)
    for tokens in (1, 7, 97, 260):
        x = rng.standard_normal((tokens, depth)).astype(np.float32)
        # Of the rounded operands even bf16 is exact to float32 sums.
        assert relative_error(product(x), reference(x, weight, tactic[0])) < 4e-6


def test_every_number_of_tokens_from_1_to_130(tactic):
    rng = np.random.default_rng(1)
    weight = random_weight(rng, 37, 140)
    x = rng.standard_normal((130, 140)).astype(np.float32)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    product = create(weight, tactic)
    for tokens in range(1, 131):
        error = np.abs(product(x[:tokens]) - expected[:tokens]).max()
        assert error < TOLERANCE[tactic[0]] * np.abs(expected).max(), f"{tokens} tokens"


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 15, 17, 31, 63, 64, 65, 95])
def test_odd_numbers_of_rows(tactic, rows):
    rng = np.random.default_rng(rows)
    weight = random_weight(rng, rows, 128)
    x = rng.standard_normal((21, 128)).astype(np.float32)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    assert relative_error(create(weight, tactic)(x), expected) < TOLERANCE[tactic[0]]


ALIKE = np.array([[1, 2, 0, 0]], np.float32)
DISJOINT = np.array([[1, 2, 0, 0], [0, 0, 3, 4]], np.float32)
OVERLAPPING = np.array([[1, 2, 0, 0], [0, 3, 4, 0], [0, 0, 5, 6], [7, 0, 0, 8], [9, 0, 1, 0]], np.float32)


@pytest.mark.parametrize("patterns", [ALIKE, DISJOINT, OVERLAPPING], ids=["alike", "disjoint", "overlapping"])
@pytest.mark.parametrize("rows", [2, 7, 64, 70, 131])
@pytest.mark.parametrize("depth", [4, 36, 132, 260])
def test_rows_that_share_all_some_or_no_lines(tactic, patterns, rows, depth):
    rng = np.random.default_rng(rows)
    order = np.arange(rows)[:, None] + rng.integers(0, 2, (1, depth // 4)) * np.arange(depth // 4)
    weight = patterns[order % len(patterns)].reshape(rows, depth) * rng.choice([-1, 1, 2], (rows, 1)).astype(np.float32)
    x = rng.standard_normal((45, depth)).astype(np.float32)
    assert relative_error(create(weight, tactic)(x), reference(x, weight, tactic[0])) < 4e-6


def test_weights_and_inputs_of_wild_ranges(tactic):
    rng = np.random.default_rng(2)
    weight = random_weight(rng, 48, 256) * (10.0 ** rng.uniform(-25, 15, (48, 256))).astype(np.float32)
    x = (rng.standard_normal((50, 256)) * 10.0 ** rng.uniform(-25, 15, (50, 256))).astype(np.float32)
    weight[:, ::8] = np.where(weight[:, ::8] != 0, np.float32(1e-41), np.float32(0))  # denormals
    x[::3] = -0.0
    weight = weight.reshape(48, 64, 4)
    weight[5] = 0  # a row that keeps nothing
    weight[:, 9] = 0  # a group that keeps nothing
    weight = weight.reshape(48, 256)
    result = create(weight, tactic)(x)
    assert relative_error(result, x.astype(np.float64) @ weight.astype(np.float64).T) < TOLERANCE[tactic[0]]
    assert not result[::3].any()
    assert not result[:, 5].any()


def test_denormal_products_are_kept_in_float32(tactic):
    if tactic[0] == "avx512-bf16":
        pytest.skip("vdpbf16ps treats denormals as zero, by definition")
    weight = np.array([[1e-20, 0, 0, 2e-20]], np.float32)
    x = np.array([[1e-20, 5, 5, -3e-20]], np.float32)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    np.testing.assert_allclose(create(weight, tactic)(x), expected, atol=3e-45)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_non_finite_input_goes_through_kept_weights_only(tactic, bad, tokens):
    rng = np.random.default_rng(3)
    weight = random_weight(rng, 40, 64)
    weight[:, 20:24] = 0
    weight[::2, 21] = 2
    weight[:, 23] = 1  # so that every row keeps two of the group, only the even ones column 21
    weight[1::2, 22] = 1
    x = rng.standard_normal((tokens, 64)).astype(np.float32)
    x[1, 21] = bad
    result = create(weight, tactic)(x)
    np.testing.assert_array_equal(result[1, ::2], bad)
    assert np.isfinite(result[1, 1::2]).all()
    assert np.isfinite(np.delete(result, 1, axis=0)).all()


def test_the_result_does_not_depend_on_the_number_of_threads(tactic):
    rng = np.random.default_rng(4)
    weight = random_weight(rng, 200, 320)
    product = create(weight, tactic)
    for tokens in (5, 257):
        x = rng.standard_normal((tokens, 320)).astype(np.float32)
        alone = product(x, activation="gelu")
        for threads in (2, 3, 5, 16):
            np.testing.assert_array_equal(product(x, activation="gelu", threads=threads), alone)


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
@pytest.mark.parametrize("rows, depth", [(64, 192), (37, 60)])
def test_what_else_is_in_a_call_does_not_change_a_token(tactic, rows, depth, activation):
    rng = np.random.default_rng(5)
    product = create(random_weight(rng, rows, depth), tactic)
    x, residual = (rng.standard_normal((211, width)).astype(np.float32) for width in (depth, rows))
    whole = product(x, residual=residual, activation=activation, threads=2)
    for tokens in (1, 2, 7, 12, 13, 24, 25, 48, 97):
        for first in (0, 1, 96, 211 - tokens):
            some = slice(first, first + tokens)
            alone = product(x[some].copy(), residual=residual[some].copy(), activation=activation)
            np.testing.assert_array_equal(alone, whole[some])


def test_no_tokens_is_no_work(tactic):
    weight = random_weight(np.random.default_rng(8), 16, 32)
    assert create(weight, tactic)(np.empty((0, 32), np.float32)).shape == (0, 16)
