"""Two layers in a row: to the bit what two calls give, on every tier, in both lanes, for every shape."""

import numpy as np
import pytest
from kernel_cases import create, random_weight, tactics

from sparse_engine.errors import InputError, UnsupportedError

# K, H, N: around the panel of 256 rows, the blocks of depth and the windows of 64.
SHAPES = [(4, 4, 1), (36, 64, 37), (64, 260, 16), (260, 252, 129), (516, 1032, 65), (128, 512, 512)]


@pytest.fixture(params=[tactic for tactic in tactics() if tactic[0] != "scalar"], ids="/".join)
def paired(request):
    """Each (tier, lanes) that computes two layers."""
    return request.param


def layers(rng, tactic, depth, hidden, rows):
    return [create(random_weight(rng, *shape), tactic) for shape in ((hidden, depth), (rows, hidden))]


def operands(rng, tokens, depth, hidden, rows):
    shapes = {"x": (tokens, depth), "first_bias": (hidden,), "bias": (rows,), "residual": (tokens, rows)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def apart(first, second, x, first_bias=None, activation="none", bias=None, residual=None):
    return second(first(x, bias=first_bias, activation=activation), bias=bias, residual=residual)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_two_calls(paired, shape):
    rng = np.random.default_rng(shape[1])
    first, second = layers(rng, paired, *shape)
    for tokens in (1, 15, 48, 97, 130, 257):
        given = operands(rng, tokens, *shape)
        expected = apart(first, second, **given, activation="gelu")
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(second.after(first, **given, activation="gelu"), expected)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu-tanh", "silu"])
@pytest.mark.parametrize("left_out", ["first_bias", "bias", "residual"])
def test_every_activation_and_absent_operands(paired, activation, left_out):
    rng = np.random.default_rng(1)
    shape = (64, 96, 80)
    first, second = layers(rng, paired, *shape)
    given = operands(rng, 33, *shape)
    given.pop(left_out)
    expected = apart(first, second, **given, activation=activation)
    np.testing.assert_array_equal(second.after(first, **given, activation=activation), expected)


def test_the_result_does_not_depend_on_the_number_of_threads(paired):
    rng = np.random.default_rng(2)
    shape = (96, 300, 70)
    first, second = layers(rng, paired, *shape)
    for tokens in (3, 257):
        given = operands(rng, tokens, *shape)
        alone = second.after(first, **given, activation="gelu")
        for threads in (2, 3, 5, 16):
            np.testing.assert_array_equal(second.after(first, **given, activation="gelu", threads=threads), alone)


@pytest.mark.parametrize("at", ["begin", "end"])
@pytest.mark.parametrize("tokens", [1, 50])
def test_arrays_next_to_a_page_without_access(paired, guarded_memory, tokens, at):
    rng = np.random.default_rng(3)
    shape = (36, 260, 37)
    first, second = layers(rng, paired, *shape)
    given = operands(rng, tokens, *shape)
    out = guarded_memory.copy(np.zeros((tokens, 37), np.float32), at)
    guarded = {name: guarded_memory.copy(array, at) for name, array in given.items()}
    second.after(first, **guarded, out=out, threads=2)
    np.testing.assert_array_equal(out, apart(first, second, **given))


def test_the_residual_may_be_the_output(paired):
    rng = np.random.default_rng(4)
    first, second = layers(rng, paired, 64, 128, 64)
    x, out = (rng.standard_normal((70, 64)).astype(np.float32) for _ in range(2))
    expected = apart(first, second, x, residual=out.copy())
    np.testing.assert_array_equal(second.after(first, x, residual=out, out=out, threads=2), expected)


def test_no_tokens_is_no_work(paired):
    first, second = layers(np.random.default_rng(5), paired, 64, 128, 32)
    assert second.after(first, np.empty((0, 64), np.float32)).shape == (0, 32)


def test_layers_that_do_not_follow_one_another(paired):
    rng = np.random.default_rng(6)
    first, second = layers(rng, paired, 64, 128, 32)
    x = np.zeros((5, 64), np.float32)
    with pytest.raises(InputError, match="the first layer has N = 32, the second K = 128; expected the same"):
        second.after(create(random_weight(rng, 32, 64), paired), x)
    for other in set(tactics()) - {paired}:
        with pytest.raises(InputError, match="two layers in a row have one tier and the same lanes"):
            second.after(create(random_weight(rng, 128, 64), other), x)
    with pytest.raises(InputError, match=r"first_bias is float32 \[32\], expected C-contiguous float32 \[128\]"):
        second.after(first, x, first_bias=np.zeros(32, np.float32))
    with pytest.raises(InputError, match=r"x is float32 \[5, 60\], expected C-contiguous float32 \[5, 64\]"):
        second.after(first, np.zeros((5, 60), np.float32))


def test_the_scalar_tier_says_that_it_has_no_such_kernel():
    first, second = layers(np.random.default_rng(7), ("scalar", "t-lanes"), 8, 16, 4)
    with pytest.raises(UnsupportedError, match="two layers in a row have no scalar kernel"):
        second.after(first, np.zeros((5, 8), np.float32))
