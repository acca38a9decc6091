"""The mask rule, against a literal transcription of what SparseDM computes, and the hardware check."""

import itertools

import numpy as np
import pytest
import torch

from sparse_engine.errors import CheckpointError, OptionError
from sparse_engine.export.masks import (
    TWO_FOUR,
    Pattern,
    energy_removed,
    is_n_of_m,
    magnitude_mask,
    obeys_training_groups,
)


def argsort_mask(weight: torch.Tensor, n: int = 2, m: int = 4) -> torch.Tensor:
    """The published rule in torch: sort |w| within each group, drop the first m - n (stable: low index first)."""
    grouped = weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight
    flat = grouped.abs().reshape(-1, m)
    dropped = torch.argsort(flat, dim=1, stable=True)[:, : m - n]
    mask = torch.ones_like(flat).scatter_(1, dropped, 0.0).reshape(grouped.shape)
    return (mask.permute(0, 3, 1, 2) if weight.ndim == 4 else mask).bool()


@pytest.mark.parametrize(
    "shape", [(8, 16), (384, 128), (6, 10), (4, 6), (16, 8, 3, 3), (12, 3, 3, 3), (4, 4, 1, 1)], ids=str
)
@pytest.mark.parametrize("n,m", [(2, 4), (1, 4), (3, 4), (4, 8), (1, 16)])
def test_mask_is_the_published_rule(shape: tuple[int, ...], n: int, m: int) -> None:
    if np.prod(shape) % m:
        pytest.skip("not a multiple")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask, tied = magnitude_mask(weight.numpy(), Pattern(n, m))
    assert np.array_equal(mask, argsort_mask(weight, n, m).numpy())
    assert tied == 0


def test_groups_cross_rows_where_inputs_are_no_multiple_of_four() -> None:
    weight = np.array([[9, 8, 1, 2, 7, 6], [1, 2, 3, 4, 9, 9]], np.float32)  # groups 9812 | 7612 | 3499
    mask, _ = magnitude_mask(weight)
    assert mask.astype(int).tolist() == [[1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    "group,kept,tied",
    [
        ([1, 1, 1, 1], [0, 0, 1, 1], 1),
        ([2, 1, -1, 0], [1, 0, 1, 0], 1),  # 1 and -1 compete: the lower index goes
        ([0, 0, 0, 5], [0, 0, 1, 1], 0),  # a tie between zeros changes nothing
        ([0.0, -0.0, 3, 2], [0, 0, 1, 1], 0),
        ([3, 3, 1, 2], [1, 1, 0, 0], 0),  # equal, and both stay
    ],
)
def test_a_tie_prunes_the_lower_index_and_is_counted(group: list[float], kept: list[int], tied: int) -> None:
    mask, counted = magnitude_mask(np.array([group], np.float32))
    assert mask.astype(int).tolist() == [kept]
    assert counted == tied


def test_masks_come_from_float32_because_a_cast_flips_bits() -> None:
    weight = np.random.default_rng(0).standard_normal((512, 512), np.float32)
    exact, _ = magnitude_mask(weight)
    rounded, tied = magnitude_mask(weight.astype(np.float16).astype(np.float32))
    assert 0 < np.mean(exact != rounded) < 1e-3
    assert tied > 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", list(itertools.product([0, 1], repeat=4)), ids=lambda bits: "".join(map(str, bits)))
def test_hardware_check_on_all_sixteen_patterns(bits: tuple[int, ...], dtype: str) -> None:
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    row = np.array([1, 0, 1, 0, *bits], dtype=kind)
    expected = sum(bits) <= 2
    assert is_n_of_m(np.stack([row, row]), TWO_FOUR, axis=1) is expected
    assert is_n_of_m(np.stack([row, row], axis=1), TWO_FOUR, axis=0) is expected


def test_hardware_groups_are_input_channels_of_each_tap() -> None:
    weight = np.zeros((2, 4, 3, 3), np.float32)
    weight[:, :2] = 1.0
    assert is_n_of_m(weight)
    weight[1, 2, 0, 2] = 1.0
    assert not is_n_of_m(weight)


def test_a_masked_first_convolution_is_not_hardware_24() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 3, 4, 4), np.float32)
    masked = weight * magnitude_mask(weight)[0]
    assert obeys_training_groups(masked)
    assert not is_n_of_m(masked)


def test_training_groups_that_cross_rows_are_not_hardware_24() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 6), np.float32)
    masked = weight * magnitude_mask(weight)[0]
    assert obeys_training_groups(masked)
    assert not is_n_of_m(masked)


def test_energy_removed() -> None:
    weight = np.array([[3, 4, 1, 2]], np.float32)
    assert energy_removed(weight, magnitude_mask(weight)[0]) == pytest.approx(5 / 30)
    assert energy_removed(np.zeros((1, 4), np.float32), np.zeros((1, 4), bool)) == 0.0


def test_gaussian_weights_lose_thirteen_percent() -> None:
    weight = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    assert energy_removed(weight, magnitude_mask(weight)[0]) == pytest.approx(0.133, abs=0.002)


def test_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"\[3, 3\] has 9 elements: not a multiple of 4"):
        magnitude_mask(np.ones((3, 3), np.float32))


@pytest.mark.parametrize("text", ["2-4", "4:2", "0:4", "a:b", "2:", ""])
def test_bad_pattern(text: str) -> None:
    with pytest.raises(OptionError, match="pattern"):
        Pattern.parse(text)
