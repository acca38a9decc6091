"""``sparse-engine finetune`` as a user meets it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sparse_engine.artifact import EngineFile
from sparse_engine.cli.main import run
from tests.finetuning.conftest import tiny_data

__all__ = ["tiny_data"]
OF_THE_MODEL = ["--heads", "4", "--null-class", "4", "--threads", "1"]
SHORT = ["--steps", "3", "--batch", "4"]


def test_a_run_and_its_engine(
    conditional_checkpoint: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    command = ["finetune", str(conditional_checkpoint), "--data", str(tiny_data), "-o", str(folder), *OF_THE_MODEL]
    assert run([*command, *SHORT, "--sample-every", "2", "--samples", "4"]) == 0
    told = capsys.readouterr()
    assert f"{folder / '000003.ckpt'}: 3 steps, loss" in told.out
    assert "images/s" in told.out
    assert run([*command, *SHORT]) == 0
    told = capsys.readouterr()
    assert "3 steps, nothing left to do" in told.out
    assert f"{folder} is done: 3 steps" in told.err.replace("\n", "")
    assert run([*command, "--steps", "5", "--batch", "4", "--json"]) == 0  # longer
    assert json.loads(capsys.readouterr().out)["begun_at"] == 3
    assert run([*command, "--steps", "50", "--batch", "4"]) == 2
    assert "its warmup is 0, and here 5" in capsys.readouterr().err.replace("\n", " ")


def test_build_takes_the_folder(
    conditional_checkpoint: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, engine = tmp_path / "run", tmp_path / "run.sengine"
    command = ["finetune", str(conditional_checkpoint), "--data", str(tiny_data), "-o", str(folder), *OF_THE_MODEL]
    assert run([*command, *SHORT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    assert run(["build", str(folder), "--sparse", "--no-autotune", "-o", str(engine)]) == 0
    manifest = EngineFile(engine).manifest
    assert sum(layer["masked"] for layer in manifest.layers) == 12
    assert "000003.ckpt of run: the only one" in manifest.notes


WRONG = [
    (["--method", "magic"], "--method = 'magic'; expected one of"),
    (["--betas", "1"], "--betas '1': expected two numbers"),
    (["--steps", "0"], "--steps = 0"),
    (["--pattern", "4:2"], "pattern 4:2"),
    (["--mask-layers", "nothing.*"], "--mask-layers 'nothing.*' matches none"),
    (["--from", "no.pth"], "no.pth does not exist"),
    (["--config", "c.json"], "--config is given beside a checkpoint"),
    (["--device", "tpu"], "is no device"),
    (["--null-context", "no.npy"], "--null-context is given, and the network is told no context"),
    (["--data", "no-folder"], "no-folder does not exist"),
    (["--data", "."], "holds no images"),
    (["--method", "dense", "--mask-layers", "*"], "--method dense masks nothing"),
]


@pytest.mark.parametrize("given, message", WRONG, ids=["".join(given) for given, _ in WRONG])
def test_wrong(
    conditional_checkpoint: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["finetune", str(conditional_checkpoint), "--data", str(tiny_data), "-o", "run", *OF_THE_MODEL, *SHORT]
    assert run([*command, *given]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert os.listdir(tmp_path) == []


def test_nothing_to_do(conditional_checkpoint: Path, tiny_data: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["finetune", str(conditional_checkpoint)]) == 2
    assert "finetune needs --data and -o" in capsys.readouterr().err
    assert run(["finetune", "--data", str(tiny_data), "-o", "run"]) == 2
    assert "there is no checkpoint to fine-tune" in capsys.readouterr().err
