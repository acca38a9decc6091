"""Ranges: each method finds what it is for, on distributions whose answer is known."""

import numpy as np
import pytest

from sparse_engine.calibration.formats import FLOAT8, INT8, UINT8
from sparse_engine.calibration.observe import Activation
from sparse_engine.calibration.ranges import RANGE_METHODS, range_method, square_error
from sparse_engine.errors import OptionError


def activation(values: np.ndarray) -> Activation:
    values = values.astype(np.float32)
    return Activation(values.min(keepdims=True), values.max(keepdims=True), values, np.abs(values).max(keepdims=True))


@pytest.fixture
def with_outlier(rng: np.random.Generator) -> Activation:
    return activation(np.append(rng.normal(0, 1, 100_000), 60.0))


def test_max_keeps_everything_and_the_others_cut_the_outlier(with_outlier: Activation) -> None:
    ends = {name: method(with_outlier, INT8) for name, method in RANGE_METHODS.items()}
    assert ends["max"] == (pytest.approx(with_outlier.values.min()), 60.0)
    assert 3.5 < ends["percentile"][1] < 5
    assert ends["entropy"][1] < 20
    assert 30 < ends["mse"][1] < 45  # cutting 60 to T costs (60 - T)^2 / 100,001, rounding (T / 127)^2 / 12


@pytest.mark.parametrize("form", [INT8, UINT8, FLOAT8], ids=lambda form: form.name)
def test_mse_is_never_worse_than_max(with_outlier: Activation, form, rng: np.random.Generator) -> None:
    for seen in (with_outlier, activation(rng.uniform(-1, 3, 10_000)), activation(rng.laplace(0, 1, 10_000))):
        best = square_error(seen.values, form, RANGE_METHODS["mse"](seen, form))
        assert best <= square_error(seen.values, form, RANGE_METHODS["max"](seen, form))


def test_mse_clips_a_gaussian_where_the_literature_does(rng: np.random.Generator) -> None:
    """Banner et al. 2019, table 1: the best clipping of a Gaussian at 8 bits is 3.92 standard deviations (4.0 here)."""
    low, high = RANGE_METHODS["mse"](activation(rng.normal(0, 1, 400_000)), INT8)
    assert 3.5 < max(-low, high) < 4.5


def test_a_zero_point_is_used_where_there_is_one(rng: np.random.Generator) -> None:
    gelu_like = activation(np.abs(rng.normal(0, 1, 50_000)) - 0.1)
    errors = [square_error(gelu_like.values, form, RANGE_METHODS["mse"](gelu_like, form)) for form in (UINT8, INT8)]
    assert errors[0] < 0.4 * errors[1]


def test_entropy_keeps_a_distribution_that_8_bits_hold_exactly(rng: np.random.Generator) -> None:
    exact = activation(rng.integers(0, 128, 100_000) / 127.0)
    assert RANGE_METHODS["entropy"](exact, INT8)[1] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", RANGE_METHODS)
def test_a_tensor_of_zeros_has_an_empty_range(name: str) -> None:
    low, high = RANGE_METHODS[name](activation(np.zeros(1000)), INT8)
    assert low <= 0 <= high
    assert INT8.scale_and_zero(low, high)[0] > 0


def test_unknown_method() -> None:
    with pytest.raises(OptionError, match="range method 'median' is not known; expected one of max, percentile"):
        range_method("median")
