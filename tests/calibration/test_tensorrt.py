"""int8 and fp8 plans, by TensorRT for RTX, which builds without a GPU: Q/DQ graphs that its parser and builder take."""

from pathlib import Path

import pytest

from sparse_engine.artifact import EngineFile
from sparse_engine.backends import TensorRTOptions
from sparse_engine.calibration.apply import Quantisation
from tests.conftest import build_with

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")


@pytest.mark.parametrize("precision,linear", [("int8", "matmul"), ("fp8", "conv1x1")])
def test_a_plan_is_built(
    tmp_path: Path, conditional_checkpoint: Path, calibration_file: Path, precision: str, linear: str
) -> None:
    path, _ = build_with(
        conditional_checkpoint,
        tmp_path / "model.sengine",
        sparse=True,
        backend="tensorrt-rtx",
        precision=precision,
        quantisation=Quantisation(calibration_file),
        tensorrt=TensorRTOptions(linear=linear),
        heads=4,
        null_class=4,
    )
    manifest = EngineFile(path).manifest
    assert (manifest.backend["name"], manifest.precision) == ("tensorrt-rtx", precision)
    assert manifest.backend["linear"] == linear
    assert any(name.endswith(".plan") for name in manifest.files)
    formats = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e4m3fn")}
    assert (manifest.quantisation["weights"], manifest.quantisation["activations"]) == formats[precision]
    assert manifest.quantisation["quality_loss"] < 0.1
    assert sum(layer["quantised"] == precision for layer in manifest.layers) == 13
