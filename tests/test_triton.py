"""Triton model repositories."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from sparse_engine.artifact import EngineFile, PayloadFile, write_engine
from sparse_engine.cli.main import run
from sparse_engine.errors import EngineFileError, OptionError, OutputError, UnsupportedError
from sparse_engine.triton import export_triton

PLAN = bytes(range(256)) * 1000


@pytest.fixture
def make(conditional_engine: Path, tmp_path: Path) -> Any:
    """An engine file with a plan in it and the manifest of a real one."""

    def write(like: Path = conditional_engine, backend: str = "tensorrt", strip: bool = False) -> Path:
        manifest = EngineFile(like).manifest
        manifest.backend = {"name": backend, "version": "10.14", "flags": {"strip_weights": strip}}
        path = tmp_path / "unet.sengine"
        write_engine(path, manifest, [PayloadFile("step.plan", len(PLAN), lambda: (PLAN,))])
        return path

    return write


def tensors(text: str) -> dict[str, tuple[str, str, list[int]]]:
    found = re.findall(r'(input|output) \[ \{ name: "(\w+)" data_type: (\w+) dims: \[ ([^\]]*) \] \} \]', text)
    return {name: (kind, data, [int(dim) for dim in dims.split(",")]) for kind, name, data, dims in found}


def test_repository(make: Any, tmp_path: Path) -> None:
    folder = export_triton(make(), tmp_path / "models")
    assert folder == tmp_path / "models" / "unet"
    assert sorted(os.listdir(folder)) == ["1", "config.pbtxt", "manifest.json"]
    assert (folder / "1" / "model.plan").read_bytes() == PLAN
    text = (folder / "config.pbtxt").read_text()
    assert text.startswith('name: "unet"\nplatform: "tensorrt_plan"\nmax_batch_size: 0\n')
    found = tensors(text)
    assert found["x"] == ("input", "TYPE_FP32", [-1, 3, 8, 8])
    assert found["y"] == ("input", "TYPE_INT64", [-1, -1])
    assert found["coef"] == ("input", "TYPE_FP32", [8])
    assert found["x_next"] == ("output", "TYPE_FP32", [-1, 3, 8, 8])
    assert len(found) == 12
    assert json.loads((folder / "manifest.json").read_text())["schedule"]["name"] == "vp-linear"
    assert os.listdir(tmp_path / "models") == ["unet"]


def test_unconditional_models_take_no_labels(make: Any, tiny_engine: Path, tmp_path: Path) -> None:
    found = tensors((export_triton(make(tiny_engine), tmp_path / "models") / "config.pbtxt").read_text())
    assert "y" not in found
    assert "guidance" not in found
    assert len(found) == 10


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt-rtx"])
def test_triton_loads_tensorrt_only(make: Any, tmp_path: Path, backend: str) -> None:
    with pytest.raises(UnsupportedError, match=f"is an engine for {backend}; Triton loads plans of TensorRT itself"):
        export_triton(make(backend=backend), tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_plan_without_weights(make: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="has a plan without weights"):
        export_triton(make(strip=True), tmp_path / "models")


def test_nothing_is_overwritten_and_nothing_left_behind(make: Any, tmp_path: Path) -> None:
    engine = make()
    export_triton(engine, tmp_path / "models")
    with pytest.raises(OutputError, match="unet exists already"):
        export_triton(engine, tmp_path / "models")
    export_triton(engine, tmp_path / "models", "other")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        export_triton(engine, tmp_path / "file")
    assert sorted(os.listdir(tmp_path / "models")) == ["other", "unet"]


@pytest.mark.parametrize("name", ["..", "a/b", 'a"b', "a\\nb"])
def test_a_name_is_one_folders(make: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match="is no name of a folder in the repository"):
        export_triton(make(), tmp_path / "models", name)
    assert not (tmp_path / "models").exists()


def test_damaged(make: Any, tmp_path: Path) -> None:
    path = make()
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(EngineFileError, match="was altered"):
        export_triton(path, tmp_path / "models")


def test_the_command(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["export-triton", str(make()), str(tmp_path / "models"), "--name", "digits"]) == 0
    assert (tmp_path / "models" / "digits" / "1" / "model.plan").is_file()
    assert run(["export-triton", str(make(backend="onnxruntime")), str(tmp_path / "models")]) == 2
    assert "build it with --backend tensorrt" in capsys.readouterr().err
