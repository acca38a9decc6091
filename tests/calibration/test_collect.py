"""Calibration data: taken along trajectories, evenly over time, labels and guidance; bad files refused by name."""

import dataclasses
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine
from sparse_engine.artifact import EngineFile
from sparse_engine.calibration.collect import ARRAYS, CalibrationData, collect, load_calibration
from sparse_engine.conditioning import Condition, class_condition
from sparse_engine.errors import InputError, OptionError, OutputError

SHAPE = (3, 8, 8)


def load(path: Path, data: CalibrationData, **other: Any) -> CalibrationData:
    return load_calibration(
        path,
        **{
            "checkpoint_sha256": data.facts["checkpoint_sha256"],
            "data_shape": SHAPE,
            "conditions": class_condition(5),
            **other,
        },
    )


def test_each_step_is_kept_equally_often_with_every_label_and_weight(data: CalibrationData) -> None:
    times, counts = np.unique(data.times, return_counts=True)
    assert (len(times), len(data)) == (8, 40)
    assert counts.max() - counts.min() <= 2
    for t in times:
        assert set(data.guidance[data.times == t]) == {1.0, 2.0}
    assert set(data.conditioning["y"][data.guidance == 1]) == {0, 1, 2, 3}
    assert np.mean(data.conditioning["y"][data.guidance == 2] == 4) == pytest.approx(0.5, abs=0.1)  # the null class
    assert np.all(np.diff(data.times) <= 0)


def test_samples_are_the_states_of_the_engines_own_trajectories(engine: SparseEngine) -> None:
    data = collect(engine, images=16, steps=8, sampler="ddim", guidance=[1.0], seed=3)
    states: list[np.ndarray] = []
    noise = engine.sample(16, steps=1, sampler="ddim", seed=3, labels=0, output="float", callback=lambda *_: True)
    assert noise.shape == (16, *SHAPE)
    labels = data.conditioning["y"][data.times == data.times.max()]
    assert len(labels) == 4
    first = data.x[data.times == data.times.max()]
    engine.sample(
        4,
        steps=8,
        sampler="ddim",
        noise=first,
        labels=labels,
        spacing="time-uniform",
        output="float",
        callback=lambda i, t, x: states.append(x),
    )
    fifth = data.x[np.isclose(data.times, np.unique(data.times)[::-1][4])]  # kept of the same images, four steps on
    assert np.allclose(fifth, states[3], atol=1e-5)


def test_the_same_seed_gives_the_same_data_and_another_does_not(engine: SparseEngine) -> None:
    first, again, other = (collect(engine, images=16, steps=8, sampler="ddim", seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.x, again.x)
    assert not np.array_equal(first.x, other.x)


def test_an_unconditional_model_has_no_labels(tiny_engine: Path) -> None:
    with SparseEngine.load(tiny_engine, threads=1) as loaded:
        told: list[tuple[int, int]] = []
        found = collect(loaded, images=16, steps=8, sampler="ddim", progress=lambda *state: told.append(state))
    assert found.conditioning == {}
    assert told[-1] == (8, 8)


def test_too_few_samples(engine: SparseEngine) -> None:
    with pytest.raises(OptionError, match="4 images of 8 steps leave fewer than 32 calibration samples"):
        collect(engine, images=4, steps=8)


def test_halves_share_no_sample_and_cover_all_times(data: CalibrationData) -> None:
    fitted, held_out = data.split()
    assert len(fitted) + len(held_out) == len(data)
    assert not {x.tobytes() for x in fitted.x} & {x.tobytes() for x in held_out.x}
    assert np.ptp(held_out.times) > 0.7 * np.ptp(data.times)


def test_a_file_comes_back_as_it_was(data: CalibrationData, calibration_file: Path) -> None:
    found = load(calibration_file, data)
    assert all(np.array_equal(getattr(found, name), getattr(data, name)) for name in ARRAYS)
    assert found.facts["seed"] == 0
    assert found.facts["sampler"] == "ddim"


def test_a_file_of_the_old_format_is_read(data: CalibrationData, calibration_file: Path, tmp_path: Path) -> None:
    """It knows labels alone."""
    with np.load(calibration_file) as archive:
        arrays = {name: archive[name] for name in ARRAYS}
        facts = {**json.loads(str(archive["facts"])), "format": "sparse-engine-calibration/1"}
        labels = archive["conditioning/y"]
    np.savez(tmp_path / "old.npz", facts=np.array(json.dumps(facts)), labels=labels, **arrays)
    assert np.array_equal(load(tmp_path / "old.npz", data).conditioning["y"], data.conditioning["y"])


def damaged(path: Path, data: CalibrationData, **changes: Any) -> Path:
    dataclasses.replace(data, **changes).save(path)
    return path


def test_it_is_of_this_model(data: CalibrationData, calibration_file: Path, conditional_engine: Path) -> None:
    assert data.facts["masked"]
    assert data.facts["checkpoint_sha256"] == EngineFile(conditional_engine).manifest.checkpoint_sha256
    with pytest.raises(InputError, match="of another model: its checkpoint's sha256 is"):
        load(calibration_file, data, checkpoint_sha256="0" * 64)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"data_shape": (1, 8, 8)}, r"holds samples of shape \[3, 8, 8\]; the model takes \[1, 8, 8\]"),
        ({"conditions": ()}, "differ in what the network is told: y and nothing"),
        ({"conditions": class_condition(3)}, "its labels do not fit a model of 3 classes"),
        ({"conditions": (Condition("y", (4,)),)}, r"do not fit a model of y float32 \[4\]"),
    ],
)
def test_of_another_shape(data: CalibrationData, calibration_file: Path, other: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(calibration_file, data, **other)


def test_too_few_in_a_file(data: CalibrationData, tmp_path: Path) -> None:
    data.take(np.arange(5)).save(tmp_path / "few.npz")
    with pytest.raises(InputError, match="holds 5 samples; expected at least 32"):
        load(tmp_path / "few.npz", data)


def test_constant_samples(data: CalibrationData, tmp_path: Path) -> None:
    path = damaged(tmp_path / "constant.npz", data, x=np.zeros_like(data.x))
    with pytest.raises(InputError, match="all of its samples are the same"):
        load(path, data)


def test_samples_of_one_time(data: CalibrationData, tmp_path: Path) -> None:
    path = damaged(tmp_path / "one-time.npz", data, times=np.full_like(data.times, 0.5))
    with pytest.raises(InputError, match="its samples are all of the time 0.5"):
        load(path, data)


@pytest.mark.parametrize("kind,message", [("folder", "is a folder; expected a file"), ("long", "File name too long")])
def test_a_path_that_cannot_be_read(data: CalibrationData, tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path if kind == "folder" else tmp_path / ("n" * 300), data)


def test_nan_samples(data: CalibrationData, tmp_path: Path) -> None:
    x = data.x.copy()
    x[3, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="x holds NaN or infinite values"):
        load(damaged(tmp_path / "nan.npz", data, x=x), data)


def test_labels_below_zero(data: CalibrationData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its labels do not fit a model"):
        load(damaged(tmp_path / "negative.npz", data, conditioning={"y": data.conditioning["y"] - 100}), data)


def test_another_element_type(data: CalibrationData, tmp_path: Path) -> None:
    for x in (data.x.astype(np.float64), data.x.astype(str)):
        with pytest.raises(InputError, match="x is .*; expected float32"):
            load(damaged(tmp_path / "type.npz", data, x=x), data)


def test_cut_short(data: CalibrationData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="times is missing or cut short"):
        load(damaged(tmp_path / "short.npz", data, times=data.times[:-1]), data)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: path.write_bytes(b"not a zip"), "is no calibration file"),
        (lambda path: np.savez(path, samples=np.zeros(3)), "is no calibration file: 'facts"),
        (
            lambda path: np.savez(path, facts=np.array(json.dumps({"format": "else"}))),
            "no calibration file of the format",
        ),
        (lambda path: np.savez(path, facts=np.array([{"a": 1}], object)), "is no calibration file"),  # a pickle
        (lambda path: np.savez(path, facts=np.array("[" * 100_000)), "is no calibration file"),
        (lambda path: np.savez_compressed(path, x=np.zeros(1 << 22)), "it unpacks to 33554"),
    ],
)
def test_not_a_calibration_file(data: CalibrationData, tmp_path: Path, write: Any, message: str) -> None:
    path = tmp_path / "other.npz"
    write(path)
    with pytest.raises(InputError, match=message):
        load(path, data)


@pytest.mark.parametrize("name", ["x", "times"])
def test_a_member_that_is_no_array(calibration_file: Path, data: CalibrationData, tmp_path: Path, name: str) -> None:
    path = tmp_path / "bytes.npz"
    with zipfile.ZipFile(calibration_file) as whole, zipfile.ZipFile(path, "w") as altered:
        for member in whole.namelist():
            altered.writestr(member, b"no array" if member == f"{name}.npy" else whole.read(member))
    with pytest.raises(InputError, match="is incomplete"):
        load(path, data)


@pytest.mark.parametrize("shape", [(), (-1, 1)])
def test_times_that_are_no_list(data: CalibrationData, tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = damaged(tmp_path / "shaped.npz", data, times=data.times[: None if shape else 1].reshape(shape))
    with pytest.raises(InputError, match="times is missing or cut short"):
        load(path, data)


@pytest.mark.parametrize("flags", [b"\x01\x00", b"\x20\x00"], ids=["encrypted", "patched"])
def test_a_zip_that_cannot_be_unpacked(
    calibration_file: Path, data: CalibrationData, tmp_path: Path, flags: bytes
) -> None:
    path = tmp_path / "flagged.npz"
    content = calibration_file.read_bytes()
    path.write_bytes(re.sub(rb"(?s)(PK\x01\x02....)..", lambda found: found[1] + flags, content))
    with pytest.raises(InputError, match="is no calibration file"):
        load(path, data)


def test_a_compressed_file_is_read(data: CalibrationData, calibration_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "compressed.npz"
    with np.load(calibration_file) as archive:
        np.savez_compressed(path, **archive)
    assert np.array_equal(load(path, data).x, data.x)


def test_missing_file_and_folder(data: CalibrationData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape("none.npz does not exist")):
        load(tmp_path / "none.npz", data)
    with pytest.raises(OutputError, match="does not exist"):
        data.save(tmp_path / "no" / "calib.npz")
