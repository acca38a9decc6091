"""What the corpus found, by name."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine
from sparse_engine.bench.results_file import read_results
from sparse_engine.calibration.collect import FORMAT, load_calibration
from sparse_engine.conditioning import class_condition
from sparse_engine.errors import BackendError, CheckpointError, EngineFileError, InputError, UnsupportedError
from sparse_engine.export.model import load_model
from sparse_engine.files import parsed_json
from tests.test_artifact import rewritten


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "nested too deep"),
        ("[1" + "0" * 400 + "]", "a number of 401 digits"),
        ("{not json", "Expecting"),
        (b"\xff\xfe\xff", "codec"),
    ],
)
def test_json_of_anybodys(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed_json(text)


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        (
            {"data_shape": [3, 2**31, 8]},
            EngineFileError,
            r"samples of \[3, 8, 8\] and y int64 \[\], its manifest says",
        ),
        ({"conditioning": []}, EngineFileError, r"and y int64 \[\], its manifest says .* and nothing else"),
        ({"backend": {"name": "onnxruntime"}}, UnsupportedError, "was built for onnxruntime on None"),
        ({"backend": {"name": "onnxruntime", "device": 7}}, EngineFileError, "its manifest is damaged"),
        ({"value_range": [0, 0]}, EngineFileError, "its manifest is damaged"),
    ],
    ids=str,
)
def test_a_manifest_that_disagrees_with_its_graph(
    conditional_engine: Path, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    path = rewritten(Path(shutil.copy(conditional_engine, tmp_path)), **changes)
    with pytest.raises(kind, match=message):
        SparseEngine.load(path, threads=1, autotune=False)


def test_labels_that_the_graph_lacks(conditional_engine: Path, tmp_path: Path) -> None:
    path = rewritten(
        Path(shutil.copy(conditional_engine, tmp_path)),
        conditioning=[each.to_dict() for each in class_condition(1000)],
    )
    with (
        SparseEngine.load(path, threads=1, autotune=False) as engine,
        pytest.raises(BackendError, match="ONNX Runtime could not run a step: .*Gather"),
    ):
        engine.sample(1, steps=1, labels=999)


@pytest.mark.parametrize("ratio", [10**400, 1e308, float("inf"), -4])
def test_a_configuration_with_an_endless_number(tiny_checkpoint: Path, tmp_path: Path, ratio: float) -> None:
    checkpoint = Path(shutil.copy(tiny_checkpoint, tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"heads": 4, "mlp_ratio": ratio}))
    with pytest.raises(CheckpointError, match=r"mlp_ratio is .*; expected a number|a number of 401 digits"):
        load_model(checkpoint)


def test_a_calibration_file_with_a_member_that_is_no_array(tmp_path: Path) -> None:
    path = tmp_path / "calib.npz"
    np.savez(path, facts=json.dumps({"format": FORMAT}))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x", b"bytes")
    with pytest.raises(InputError, match="is incomplete: it holds no x"):
        load_calibration(path, checkpoint_sha256="", data_shape=(3, 8, 8), conditions=())


def test_a_results_file_that_is_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is no results file: it is nested too deep"):
        read_results(tmp_path / "results.json")
