"""The digits in int8: as good as in fp32, and the table says what was measured."""

import json
from pathlib import Path

import numpy as np

from sparse_engine import SparseEngine
from sparse_engine.artifact import EngineFile
from tests.conftest import build_with
from tests.examples.test_digits import DIGITS, script


def test_readme_table_is_the_results_file() -> None:
    quantisation = script("quantisation")
    results = json.loads(quantisation.RESULTS.read_text())
    text = (DIGITS / "README.md").read_text()
    assert f"{quantisation.BEGIN}\n{quantisation.table(results)}\n" in text
    rows = {(row["model"], row["precision"]): row for row in results["rows"]}
    assert len(rows) == len(quantisation.MODELS) * len(quantisation.BACKENDS)
    for model in quantisation.MODELS:
        reference, int8 = rows[model, "fp32"], rows[model, "int8"]
        assert abs(int8["accuracy"] - reference["accuracy"]) <= 0.01
        assert int8["frechet"] - reference["frechet"] < 0.05
        assert rows[model, "fp16"]["psnr"] > rows[model, "bf16"]["psnr"] > int8["psnr"]


def test_sparse_int8_reads_as_sparse_fp32_does(tmp_path: Path) -> None:
    quantisation, evaluate = script("quantisation"), script("evaluate")
    checkpoint = DIGITS / "sparsedm.pth"
    calibration, _ = quantisation.calibrate(checkpoint, tmp_path, sparse=True)
    float_engine = tmp_path / "calibrated.sengine"
    int8_engine, _ = build_with(
        checkpoint, tmp_path / "int8.sengine", sparse=True, precision="int8", quantisation=calibration
    )
    assert EngineFile(int8_engine).manifest.quantisation["quality_loss"] < 0.03
    machine, _ = evaluate.classifier()
    labels = np.resize(np.arange(10), 200)
    read = {}
    for path in (float_engine, int8_engine):
        with SparseEngine.load(path) as engine:
            read[path] = machine.predict(quantisation.draw(engine, labels).clip(-1, 1).reshape(200, 64))
    accuracy = {path: np.mean(digits == labels) for path, digits in read.items()}
    assert accuracy[int8_engine] >= accuracy[float_engine] - 0.01
    assert np.mean(read[int8_engine] == read[float_engine]) > 0.98
