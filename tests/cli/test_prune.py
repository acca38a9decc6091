"""``sparse-engine prune`` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sparse_engine.artifact import EngineFile
from sparse_engine.cli.main import run
from sparse_engine.export.model import load_model
from tests.conftest import TINY_CONDITIONAL, random_state
from tests.pruning.states import states_of

MODEL = ["--heads", "4", "--null-class", "4"]


@pytest.fixture(scope="module")
def calib(conditional_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States that need no engine."""
    path = tmp_path_factory.mktemp("calib") / "calib.npz"
    states_of(load_model(conditional_checkpoint, heads=4, null_class=4)).save(path)
    return path


@pytest.fixture(autouse=True)
def one_thread(one_torch_thread: None) -> None:
    pass


def pruned(checkpoint: Path, output: Path, *options: str) -> int:
    return run(["prune", str(checkpoint), "-o", str(output), *MODEL, *options])


def test_prune_then_build_with_three_layers_left_dense(
    tmp_path: Path, conditional_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    """From trajectories of its own; the three that are damaged most stay as they are, to the bit."""
    output, plot, engine = tmp_path / "pruned.safetensors", tmp_path / "errors.png", tmp_path / "m.sengine"
    quick = ["--images", "16", "--steps", "8", "--sampler", "ddim"]
    assert pruned(conditional_checkpoint, output, *quick, "--dense-layers", "3", "--plot", str(plot)) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "9 of 12 layers 2:4 by full in" in said
    assert "(kept dense by prune: pruning it did most damage)" in said
    assert min(Image.open(plot).size) > 300
    assert run(["build", str(output), "--sparse", "-o", str(engine)]) == 0  # the heads are beside it
    said = capsys.readouterr().out.replace("\n", " ")
    assert "9 of 16 layers masked, 9 of them hardware 2:4" in said
    layers = {layer["name"]: layer for layer in EngineFile(engine).manifest.layers}
    dense = [name for name, layer in layers.items() if (layer["reason"] or "").startswith("kept dense by prune")]
    assert len(dense) == 3
    assert all(name in said for name in dense)
    state, found = torch.load(conditional_checkpoint), load_file(output)
    for name in dense:
        assert torch.equal(found[f"{name}.weight"], state[f"{name}.weight"])
        assert layers[name]["nonzeros"] == layers[name]["parameters"]
    assert run(["verify", str(engine), "--against", str(output)]) == 0
    names = ["errors.png", "m.sengine", "pruned.json", "pruned.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_json_has_every_layer(
    tmp_path: Path, conditional_checkpoint: Path, calib: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--calib", str(calib), "--method", "wanda", "--mask-layers", "mid_block.*", "--json"]
    assert pruned(conditional_checkpoint, tmp_path / "x.safetensors", *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in report["layers"]] == [
        f"mid_block.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert all(layer["error"] > 0 for layer in report["layers"])
    assert report["float64"]["flops"] > 0


def folder_of_pictures(path: Path) -> Path:
    rng = np.random.default_rng(0)
    for label in range(4):
        (path / str(label)).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(path / str(label) / f"{index}.png")
    return path


def test_images_with_noise_on_them(tmp_path: Path, conditional_checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    data, output = folder_of_pictures(tmp_path / "data"), tmp_path / "x.safetensors"
    given = ["--data", str(data), "--images", "16", "--steps", "8", "--method", "sparsegpt"]
    (data / "0" / "9.png").write_bytes(b"no picture")
    assert pruned(conditional_checkpoint, output, *given) == 2
    assert "9.png cannot be read as a picture" in capsys.readouterr().err.replace("\n", "")
    assert pruned(conditional_checkpoint, output, *given, "--skip-broken") == 0
    assert output.exists()
    Image.new("RGB", (9, 8)).save(data / "1" / "9.png")
    assert pruned(conditional_checkpoint, output, *given, "--skip-broken") == 2
    assert "the model draws 8x8 pixels, and the pictures are" in capsys.readouterr().err.replace("\n", " ")
    (tmp_path / "none").mkdir()
    assert pruned(conditional_checkpoint, output, "--data", str(tmp_path / "none")) == 2
    assert "holds no images" in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--method", "best"], "method 'best' is not known"),
        (["--pattern", "2-4"], "pattern '2-4' is not of the form N:M"),
        (["--dense-layers", "12"], "12 are to stay dense: none is left"),
        (["--dense-layers", "-1"], "dense_layers is -1"),
        (["--mask-layers", "encoder.*"], "'encoder.*' matches none of the"),
        (["--max-memory", "0"], "--max-memory 0: expected 0.001 to"),
        (["--images", "1"], "leave fewer than 32 calibration samples"),
        (["--skip-broken"], "--skip-broken is given without --data"),
        (["--data", "x", "--calib", "y"], "--calib and --data are given"),
        (["--data", "no-such-folder"], "no-such-folder does not exist"),
        (["--calib", "no-such.npz"], "no-such.npz does not exist"),
        (["--plot", "x.gif"], "ends in .png"),
        (["-o", "no/folder/x.safetensors"], "the folder no/folder does not exist"),
        (["-o", "x.pth"], "ends in .safetensors"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    conditional_checkpoint: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["prune", str(conditional_checkpoint), "-o", "x.safetensors", *MODEL, *options]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_a_pruned_checkpoint_is_refused_but_by_force(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state: dict[str, Any] = random_state(TINY_CONDITIONAL)
    state["mid_block.mlp.fc1.weight"].view(-1, 4)[:, :2] = 0
    torch.save(state, tmp_path / "x.pth")
    states_of(load_model(tmp_path / "x.pth", heads=4, null_class=4)).save(tmp_path / "c.npz")
    only = ["--mask-layers", "mid_block.*", "--method", "magnitude", "--calib", str(tmp_path / "c.npz")]
    assert pruned(tmp_path / "x.pth", tmp_path / "y.safetensors", *only) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "1 of the 4 selected layers are 2:4 already: mid_block.mlp.fc1" in said
    assert "--force" in said
    assert pruned(tmp_path / "x.pth", tmp_path / "y.safetensors", *only, "--force") == 0


def test_a_full_disk_leaves_what_is_done_and_no_half_result(
    tmp_path: Path, conditional_checkpoint: Path, calib: Path, capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    output = tmp_path / "x.safetensors"
    given = ["--calib", str(calib), "--mask-layers", "mid_block.*"]
    with monkeypatch.context() as patched:
        patched.setattr("sparse_engine.pruning.write.save_file", full)
        assert pruned(conditional_checkpoint, output, *given) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not output.exists()
    assert pruned(conditional_checkpoint, output, *given) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_same_command_goes_on_after_a_kill(
    tmp_path: Path, conditional_checkpoint: Path, calib: Path, number: int
) -> None:
    whole, output = tmp_path / "whole.safetensors", tmp_path / "x.safetensors"
    assert pruned(conditional_checkpoint, whole, "--calib", str(calib)) == 0
    given = ["prune", str(conditional_checkpoint), "-o", str(output), *MODEL, "--calib", str(calib)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "sparse_engine", *given]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        done = tmp_path / "x.safetensors.partial" / "first"
        while process.poll() is None and (not done.is_dir() or len(list(done.glob("*.npz"))) < 2):
            time.sleep(0.002)
        process.send_signal(number)
        said = process.communicate()[1]
    if process.returncode == 0:
        pytest.skip("it was done before it could be killed")
    assert not output.exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "x.safetensors.partial has what is done: the same command goes on with it" in said.replace("\n", " ")
    assert run(given) == 0
    expected, found = load_file(whole), load_file(output)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not output.with_name("x.safetensors.partial").exists()
