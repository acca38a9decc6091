"""``sparse-engine calibrate`` and int8 builds as a user meets them."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_engine.cli.main import run

QUICK = ["--images", "16", "--steps", "8", "--sampler", "ddim"]


def test_calibrate_then_build_int8(tmp_path: Path, conditional_checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    calib, plot, engine = tmp_path / "calib.npz", tmp_path / "ranges.png", tmp_path / "model.sengine"
    given = ["--sparse", "--heads", "4", "--null-class", "4"]
    called = ["calibrate", str(conditional_checkpoint), "-o", str(calib), "--plot", str(plot), *given, *QUICK]
    assert run(called) == 0
    assert f"32 samples: {calib}" in capsys.readouterr().err.replace("\n", "")
    assert np.load(calib)["x"].shape == (32, 3, 8, 8)
    assert min(Image.open(plot).size) > 500
    built = ["build", str(conditional_checkpoint), "-o", str(engine), "--precision", "int8", "--calib", str(calib)]
    assert run([*built, "--keep-float", "*.skip_linear", *given]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "12 of 16 layers are int8; the prediction differs from fp32 by" in said
    assert re.search(r"\d+ run by a sparse kernel on this machine", said)  # whichever is faster here
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.npz", "model.sengine", "ranges.png"]


def test_an_engine_can_be_calibrated(tmp_path: Path, tiny_engine: Path) -> None:
    calib = tmp_path / "calib.npz"
    assert run(["calibrate", str(tiny_engine), "-o", str(calib), "--guidance", "1", *QUICK]) == 0
    assert "labels" not in np.load(calib)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--images", "1"], "1 images of 20 steps leave fewer than 32 calibration samples"),
        (["--guidance", "two"], "--guidance 'two': expected numbers"),
        (["--guidance", "2", *QUICK], "guidance = 2.0, but the model is told nothing"),
        (["-o", "no/such/folder/calib.npz"], "the folder no/such/folder does not exist"),
        (["--plot", "no/such/folder/x.png"], "the folder no/such/folder does not exist"),
        (["--sampler", "none"], "none"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    tiny_engine: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["calibrate", str(tiny_engine), *options]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--precision", "int8"], "precision int8 needs calibration data"),
        (["--keep-float", "*"], "--smooth, --keep-float and --max-quality-loss need --calib"),
        (["--precision", "int8", "--calib", "none.npz"], "none.npz does not exist"),
        (["--calib", "none.npz"], "calibration data is given, but precision fp32 uses none"),
        (["--precision", "fp8", "--calib", "none.npz"], "precision 'fp8' is not supported by the onnxruntime backend"),
        (["--precision", "int8", "--calib", "none.npz", "--ranges", "median"], "range method 'median' is not known"),
    ],
)
def test_bad_builds(
    tmp_path: Path, tiny_checkpoint: Path, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    built = ["build", str(tiny_checkpoint), "--heads", "4", "-o", str(tmp_path / "model.sengine"), *options]
    assert run(built) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())
