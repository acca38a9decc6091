"""Samples to pictures and arrays."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_engine.errors import OutputError
from sparse_engine.images import encode_png, grid, write_samples
from sparse_engine.results import to_uint8


def test_range_to_bytes() -> None:
    x = np.array([-2.0, -1.0, 0.0, 1.0, 3.0], np.float32).reshape(1, 1, 1, 5)
    assert to_uint8(x, (-1.0, 1.0)).ravel().tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(x, (0.0, 2.0)).ravel().tolist() == [0, 0, 0, 128, 255]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grid_keeps_every_picture_in_its_place(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, channels), np.uint8)
    sheet = grid(images, columns=3, gap=2)
    scale = 2
    assert sheet.shape == (2 + 3 * 66, 2 + 3 * 66, channels)
    assert np.array_equal(sheet[2 + 66 : 2 + 66 + 64 : scale, 2 : 2 + 64 : scale], images[3])
    assert (sheet[-64:-2, -64:-2] == 255).all()  # the places that are left over


def test_grid_of_one() -> None:
    assert grid(np.zeros((1, 64, 64, 3), np.uint8)).shape == (68, 68, 3)


def test_channels_that_no_png_has(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a sample has 2 channels; a PNG has 1, 3 or 4"):
        encode_png(np.zeros((8, 8, 2), np.uint8))


def test_folder_that_fails_half_way_is_cleared(tmp_path: Path) -> None:
    def batches() -> Iterator[np.ndarray]:
        yield np.zeros((3, 8, 8, 3), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(tmp_path / "out", batches())
    assert os.listdir(tmp_path) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000000.png").touch()
    with pytest.raises(OutputError, match="is there already and is not an empty folder"):
        write_samples(tmp_path / "out", [np.zeros((1, 8, 8, 3), np.uint8)])
    assert os.listdir(tmp_path / "out") == ["000000.png"]
    (tmp_path / "empty").mkdir()
    assert write_samples(tmp_path / "empty", [np.zeros((2, 8, 8, 3), np.uint8)]) == 2
    assert sorted(os.listdir(tmp_path / "empty")) == ["000000.png", "000001.png"]


def test_another_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=".jpg is no kind of file that samples go to"):
        write_samples(tmp_path / "x.jpg", [np.zeros((1, 8, 8, 3), np.uint8)])


def test_png_round_trip(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 1), np.uint8)
    assert write_samples(tmp_path / "x.png", [images[:3], images[3:]]) == 4
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), grid(images)[..., 0])


def test_unwritable_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written|does not exist"):
        write_samples(tmp_path / "file" / "x.png", [np.zeros((1, 8, 8, 3), np.uint8)])
    with pytest.raises(OutputError, match="is there already"):
        write_samples(tmp_path / "file", [np.zeros((1, 8, 8, 3), np.uint8)])
