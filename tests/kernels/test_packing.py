"""Canonical 2:4 weights: packing, unpacking, and what is refused."""

import itertools
import re

import numpy as np
import pytest

from sparse_engine.errors import InputError, UnsupportedError
from sparse_engine.kernels import pack, unpack, validate

PATTERNS = list(itertools.product([0, 1], repeat=4))


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if sum(p) <= 2], ids=str)
def test_each_pattern_of_at_most_two_survives_the_round_trip(pattern):
    weight = np.array([[1.5, -2.0, 3.0, -0.25]], np.float32) * np.array(pattern, np.float32)
    values, positions = pack(weight)
    assert values.shape == (1, 2)
    assert positions.shape == (1, 1)
    np.testing.assert_array_equal(unpack(values, positions), weight)


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if sum(p) > 2], ids=str)
def test_each_pattern_of_more_than_two_is_refused_by_row_and_group(pattern):
    weight = np.zeros((5, 12), np.float32)
    weight[3, 4:8] = pattern
    message = rf"row 3, group 1 \(columns 4 to 7\) has {sum(pattern)} nonzeros, expected at most 2; 1 groups"
    with pytest.raises(UnsupportedError, match=message) as error:
        pack(weight)
    assert "2:4 mask" in error.value.fix


def test_positions_are_first_then_second_in_two_bits_each():
    weight = np.array([[0, 7, 0, 9, 5, 0, 6, 0]], np.float32)
    values, positions = pack(weight)
    np.testing.assert_array_equal(values, [[7, 9, 5, 6]])
    np.testing.assert_array_equal(positions, [[1 | 3 << 2, 0 | 2 << 2]])


def test_denormals_and_not_a_number_are_kept_and_minus_zero_is_not():
    weight = np.array([[1e-45, -0.0, np.nan, -0.0]], np.float32)
    values, positions = pack(weight)
    assert values[0, 0] == np.float32(1e-45)
    assert np.isnan(values[0, 1])
    assert positions[0, 0] == 0 | 2 << 2


@pytest.mark.parametrize(
    "weight, found",
    [
        (np.zeros((2, 6), np.float32), "float32 [2, 6]"),
        (np.zeros((2, 8), np.float64), "float64 [2, 8]"),
        (np.zeros(8, np.float32), "float32 [8]"),
        (np.zeros((0, 8), np.float32), "float32 [0, 8]"),
    ],
    ids=["depth", "dtype", "rank", "empty"],
)
def test_pack_refuses_what_is_not_a_float32_matrix_of_groups(weight, found):
    with pytest.raises(InputError, match=re.escape(f"weight is {found}, expected float32 [N, K]")):
        pack(weight)


@pytest.mark.parametrize("code", [0, 1, 2, 5, 15, 16, 255, 1 << 2 | 3])
def test_positions_out_of_order_or_range_are_refused_by_row_and_group(code):
    positions = np.full((3, 4), 0 | 1 << 2, np.uint8)
    positions[2, 1] = code
    with pytest.raises(InputError, match=f"row 2, group 1 are {code}, expected first"):
        validate(np.zeros((3, 8), np.float32), positions)


def test_values_and_positions_must_belong_together():
    with pytest.raises(InputError, match="do not belong together"):
        validate(np.zeros((3, 6), np.float32), np.full((3, 4), 4, np.uint8))
    with pytest.raises(InputError, match="expected float32"):
        validate(np.zeros((3, 8), np.float16), np.full((3, 4), 4, np.uint8))
