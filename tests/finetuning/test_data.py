"""Pictures, arrays and latents, and what is said of those that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparse_engine.errors import InputError, OptionError
from sparse_engine.export.families.uvit_t2i import UViTT2I, UViTT2IConfig
from sparse_engine.export.model import Model, load_model
from sparse_engine.pruning import pictures
from sparse_engine.pruning.data import Data, DataOptions, load_data
from sparse_engine.pruning.draws import Draws
from tests.conftest import TINY_LATENT, save_checkpoint, save_network

T2I = UViTT2IConfig(8, 2, 4, 32, 2, 4, context_dim=6, context_length=3)


@pytest.fixture(scope="module")
def model(conditional_checkpoint: Path) -> Model:
    return load_model(conditional_checkpoint, heads=4, null_class=4)


@pytest.fixture(scope="module")
def unconditional(tiny_checkpoint: Path) -> Model:
    return load_model(tiny_checkpoint, heads=4)


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save_checkpoint(tmp_path_factory.mktemp("l") / "l.pth", TINY_LATENT), heads=4, null_class=4)


@pytest.fixture(scope="module")
def told_a_text(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save_network(tmp_path_factory.mktemp("t") / "t.pth", UViTT2I(T2I)), heads=4, context_length=3)


def picture(path: Path, value: int, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size, 3) % 50 + value
    Image.fromarray(ramp.astype(np.uint8)).save(path)
    return path


def examples(data: Data, step: int = 0, batch: int = 4) -> tuple[np.ndarray, Any]:
    draws, samples = Draws(0, data.count, batch), np.arange(batch)
    rows = np.arange(batch) % data.count
    found = data.examples(rows, draws.of(step, samples), draws, step, samples)
    return found.x0, found.told


def test_folders_by_class(model: Model, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for index in range(2):
            picture(tmp_path / name / f"{index}.png", 100 * (name == "dog") + index)
    data = load_data(tmp_path, model, DataOptions(dropout=0))
    x0, told = examples(data)
    assert x0.shape == (4, 3, 8, 8)
    assert (x0.dtype, told["y"].dtype) == (np.float32, np.int64)
    assert told["y"].tolist() == [0, 0, 1, 1]
    assert x0[2, 0, 0, 0] == pytest.approx(100 / 127.5 - 1)
    assert "classes by name: cat = 0, dog = 1" in data.notes


def test_numbers_are_classes_of_their_own(model: Model, tmp_path: Path) -> None:
    for name in ("3", "1"):
        picture(tmp_path / name / "a.png", 0)
    assert examples(load_data(tmp_path, model, DataOptions(dropout=0)))[1]["y"].tolist() == [1, 3, 1, 3]
    picture(tmp_path / "7" / "a.png", 0)
    with pytest.raises(
        InputError, match=r"1 labels do not fit, such as 7 of image 2; the model has classes 0 to 3 \(4"
    ):
        load_data(tmp_path, model, DataOptions())


def test_tables_of_labels(model: Model, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name, 0)
    with pytest.raises(InputError, match=r"says no class of its images, and the model has 4"):
        load_data(tmp_path, model, DataOptions())
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["a.png", 2], ["b.png", 0]]}))
    assert examples(load_data(tmp_path, model, DataOptions(dropout=0)), batch=2)[1]["y"].tolist() == [2, 0]
    (tmp_path / "labels.csv").write_text("a.png,1\nb.png,3\n")
    assert examples(load_data(tmp_path, model, DataOptions(dropout=0)), batch=2)[1]["y"].tolist() == [1, 3]
    (tmp_path / "labels.csv").write_text("a.png,1\n")
    with pytest.raises(InputError, match=r"labels.csv has no label for 1 of 2 files, such as b.png"):
        load_data(tmp_path, model, DataOptions())
    (tmp_path / "labels.csv").write_text("a.png\n")
    with pytest.raises(InputError, match="expected lines of a file's name and its label"):
        load_data(tmp_path, model, DataOptions())
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(InputError, match="dataset.json holds no labels"):
        load_data(tmp_path, model, DataOptions())


def test_more_classes_than_the_model_has(model: Model, tmp_path: Path) -> None:
    for name in "abcde":
        picture(tmp_path / name / "a.png", 0)
    with pytest.raises(InputError, match="has 5 classes, and the model 4"):
        load_data(tmp_path, model, DataOptions())


def test_nothing_there(unconditional: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no images\n.*\.png"):
        load_data(tmp_path, unconditional, DataOptions())
    with pytest.raises(InputError, match="does not exist"):
        load_data(tmp_path / "no", unconditional, DataOptions())


def test_mixed_sizes(unconditional: Model, tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    picture(tmp_path / "b.png", 0, (16, 24))
    with pytest.raises(InputError, match=r"draws 8x8 pixels, and the pictures are 1 of 8x8, 1 of 16x24\n.*--resize"):
        load_data(tmp_path, unconditional, DataOptions())
    x0, _ = examples(load_data(tmp_path, unconditional, DataOptions(resize=True)), batch=2)
    with Image.open(tmp_path / "b.png") as image:
        expected = image.resize((12, 8), Image.Resampling.BICUBIC).crop((2, 0, 10, 8))
    np.testing.assert_allclose(x0[1], np.asarray(expected).transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_broken_pictures(unconditional: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    """Where pixels are kept, all is decoded at once; else heads are read, and a broken body is found on its turn."""
    if not kept:
        monkeypatch.setattr(pictures, "IN_MEMORY", 0)
    good = picture(tmp_path / "a.png", 0)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"b.png cannot be read as a picture: .*\n.*--skip-broken"):
        load_data(tmp_path, unconditional, DataOptions())
    data = load_data(tmp_path, unconditional, DataOptions(skip_broken=True))
    assert data.count == 1
    assert "1 broken files left out, such as b.png" in data.notes
    cut = tmp_path / "c.png"
    cut.write_bytes(good.read_bytes()[:-40])
    if kept:
        with pytest.raises(InputError, match="b.png cannot be read as a picture"):
            load_data(tmp_path, unconditional, DataOptions())
    else:
        data = load_data(tmp_path, unconditional, DataOptions(skip_broken=True))
        with pytest.raises(InputError, match="c.png cannot be read as a picture"):
            data.images(np.array([1]))


def test_flips(unconditional: Model, tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    plain, _ = examples(load_data(tmp_path, unconditional, DataOptions()), batch=16)
    flipped, _ = examples(load_data(tmp_path, unconditional, DataOptions(flip=True)), batch=16)
    mirrored = [np.array_equal(a, b[..., ::-1]) for a, b in zip(flipped, plain, strict=True)]
    same = [np.array_equal(a, b) for a, b in zip(flipped, plain, strict=True)]
    assert [a != b for a, b in zip(mirrored, same, strict=True)] == [True] * 16
    assert 2 < sum(mirrored) < 14


def test_labels_are_dropped_as_often_as_asked(model: Model, tiny_data: Path) -> None:
    _, told = examples(load_data(tiny_data, model, DataOptions(dropout=0.25)), batch=2000)
    assert (told["y"] == 4).mean() == pytest.approx(0.25, abs=0.03)
    assert (examples(load_data(tiny_data, model, DataOptions(dropout=0)), batch=2000)[1]["y"] < 4).all()


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


PIXELS = np.zeros((4, 8, 8, 3), np.uint8)
LABELS = np.arange(4)
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("no images", {"labels": LABELS}, "expected one of images"),
    ("size", {"images": np.zeros((4, 9, 9, 3), np.uint8), "labels": LABELS}, r"uint8 \[4, 9, 9, 3\]; the model draws"),
    ("floats", {"images": np.zeros((4, 1, 8, 8), np.float32), "labels": LABELS}, r"images of \[1, 8, 8\]; the model"),
    (
        "units",
        {"images": np.full((4, 3, 8, 8), 200.0), "labels": LABELS},
        "is 200 to 200; the model's range is -1 to 1",
    ),
    ("nan", {"images": np.full((4, 3, 8, 8), np.nan), "labels": LABELS}, "NaN or infinite"),
    ("ints", {"images": np.zeros((4, 3, 8, 8), np.int64), "labels": LABELS}, "is no array of images"),
    ("count", {"images": PIXELS, "labels": np.arange(3)}, "labels|y does not fit images"),
    ("null", {"images": PIXELS, "labels": LABELS + 1}, r"1 labels do not fit, such as 4 of image 3"),
    ("real", {"images": PIXELS, "labels": LABELS / 2}, "labels are float64"),
    ("empty", {"images": PIXELS[:0], "labels": LABELS[:0]}, "holds no images"),
]


@pytest.mark.parametrize("arrays, message", [each[1:] for each in WRONG], ids=[each[0] for each in WRONG])
def test_arrays_that_do_not_fit(model: Model, tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(npz(tmp_path / "x.npz", **arrays), model, DataOptions())


def test_no_npz(model: Model, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK no zip")
    with pytest.raises(InputError, match="is no .npz file of arrays"):
        load_data(tmp_path / "x.npz", model, DataOptions())


def test_adms_names_and_the_models_own_range(model: Model, tmp_path: Path) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (4, 3, 8, 8)).astype(np.float32)
    data = load_data(npz(tmp_path / "x.npz", arr_0=images, arr_1=LABELS % 4), model, DataOptions(dropout=0))
    x0, told = examples(data)
    assert np.array_equal(x0, images)
    assert told["y"].tolist() == [0, 1, 2, 3]


def test_latents_are_drawn_from_their_moments(latent: Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mean, log_variance = rng.standard_normal((2, 4, 4, 8, 8)).astype(np.float32)
    moments = np.concatenate([mean, log_variance], axis=1)
    data = load_data(npz(tmp_path / "x.npz", moments=moments, labels=LABELS % 4), latent, DataOptions(latent_scale=0.5))
    x0, _ = examples(data)
    normals = Draws(0, 4, 4).latent_noise(0, np.arange(4), (4, 8, 8))
    np.testing.assert_allclose(x0, 0.5 * (mean + np.exp(0.5 * log_variance) * normals), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(x0, examples(data, step=1)[0])
    for index in range(4):
        (tmp_path / "npy" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "npy" / str(index % 2) / f"{index}.npy", moments[index])
    found, told = examples(load_data(tmp_path / "npy", latent, DataOptions(latent_scale=0.5, dropout=0)))
    assert told["y"].tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(found[0], x0[0], rtol=1e-5)


def test_pictures_for_a_latent_model(latent: Model, tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    with pytest.raises(OptionError, match="holds pictures, and this is a latent model"):
        load_data(tmp_path, latent, DataOptions())


def test_contexts_one_of_several(told_a_text: Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(3):
        np.save(tmp_path / f"{index}.npy", rng.standard_normal((8, 8, 8)).astype(np.float32))
        for k in range(2):
            np.save(tmp_path / f"{index}_{k}.npy", np.full((3, 6), 10 * index + k, np.float32))
    null = tmp_path / "null" / "null.npy"
    null.parent.mkdir()
    np.save(null, np.full((3, 6), -1, np.float32))
    folder = tmp_path / "data"
    folder.mkdir()
    for file in tmp_path.glob("*.npy"):
        file.rename(folder / file.name)
    data = load_data(folder, told_a_text, DataOptions(null_context=null, dropout=0.2))
    assert data.count == 3
    _, told = examples(data, batch=300)
    assert told["context"].shape == (300, 3, 6)
    values, counts = np.unique(told["context"][:, 0, 0], return_counts=True)
    assert values.tolist() == [-1, 0, 1, 10, 11, 20, 21]
    assert min(counts) > 20
    without = load_data(folder, told_a_text, DataOptions())
    assert any("nothing is dropped" in note and "--null-context" in note for note in without.notes)
    np.save(null, np.zeros((2, 6), np.float32))
    with pytest.raises(OptionError, match=r"null.npy is \[2, 6\]; a context is \[3, 6\]"):
        load_data(folder, told_a_text, DataOptions(null_context=null))
    (folder / "1_0.npy").unlink()
    (folder / "1_1.npy").unlink()
    with pytest.raises(InputError, match="1.npy has no context beside it; others have"):
        load_data(folder, told_a_text, DataOptions())


def test_a_context_that_is_missing_or_of_another_shape(told_a_text: Model, tmp_path: Path) -> None:
    latents = np.zeros((4, 4, 8, 8), np.float32)
    with pytest.raises(InputError, match=r"has no context, which the network is told: float32 \[3, 6\]"):
        load_data(npz(tmp_path / "x.npz", latents=latents), told_a_text, DataOptions())
    with pytest.raises(InputError, match=r"context is \[2, 6\] an image; the network is told \[3, 6\]"):
        load_data(npz(tmp_path / "x.npz", latents=latents, context=np.zeros((4, 2, 6))), told_a_text, DataOptions())
