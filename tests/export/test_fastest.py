"""``--precision auto``: one precision that cannot be built does not end the others."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_engine import SparseEngine
from sparse_engine.artifact import EngineFile
from sparse_engine.calibration.apply import Quantisation
from sparse_engine.calibration.collect import collect
from sparse_engine.errors import BackendError, CheckpointError, QualityLimitError
from sparse_engine.export import fastest
from tests.conftest import TINY, build_with, random_state

pytestmark = pytest.mark.usefixtures("one_torch_thread")
LARGE = "in_blocks.0.mlp.fc2"


@pytest.fixture(autouse=True)
def float_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "PRECISIONS", ("fp32", "tf32", "bf16", "fp16"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One weight beyond what fp16 holds."""
    state = random_state(TINY)
    state[f"{LARGE}.weight"][0, 0] = 1e5
    path = tmp_path_factory.mktemp("large") / "large.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def calibration(checkpoint: Path, build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Quantisation:
    path = tmp_path_factory.mktemp("calibration") / "calib.npz"
    with SparseEngine.load(build(checkpoint), threads=1) as engine:
        collect(engine, images=20, steps=8, sampler="ddim").save(path)
    return Quantisation(path, max_quality_loss=0.9)


def build_auto(folder: Path, checkpoint: Path, wanted: Quantisation, **options: Any) -> tuple[str, str]:
    """The precision chosen, and the note that says why."""
    options = {"heads": 4, "backend": "torch", "device": "cpu", "batch": (1, 2, 4), **options}
    path, manifest = build_with(checkpoint, folder / "x.sengine", precision="auto", quantisation=wanted, **options)
    assert EngineFile(path).manifest.notes == manifest.notes
    return manifest.precision, next(note for note in manifest.notes if "the fastest within" in note)


def failing(monkeypatch: pytest.MonkeyPatch, *precisions: str) -> None:
    """Let the backend fail in some precisions."""

    def write(*arguments: Any) -> Any:
        if arguments[5].precision in precisions:
            raise BackendError("the builder gave no plan", "build without it")
        return write_built(*arguments)

    write_built = fastest.write_built
    monkeypatch.setattr(fastest, "write_built", write)


def test_weights_beyond_fp16_leave_the_other_precisions(
    tmp_path: Path, checkpoint: Path, calibration: Quantisation
) -> None:
    chosen, note = build_auto(tmp_path, checkpoint, calibration)
    assert chosen in ("fp32", "bf16")
    offered, left_out = note.split("; left out: ")
    assert "fp32" in offered
    assert "bf16" in offered
    assert "fp16" not in offered
    assert f"fp16 ({LARGE}.weight holds 1e+05, which is beyond the range of fp16 (65504))" in left_out
    assert "tf32 (precision 'tf32' is not supported by the torch backend" in left_out


def test_a_backend_that_fails_in_one_precision(
    tmp_path: Path, checkpoint: Path, calibration: Quantisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "bf16")
    chosen, note = build_auto(tmp_path, checkpoint, calibration)
    assert chosen == "fp32"
    assert "bf16 (the builder gave no plan)" in note


def test_an_engine_that_does_not_run_is_closed_and_left_out(
    tmp_path: Path, checkpoint: Path, calibration: Quantisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[SparseEngine] = []

    def predict(engine: SparseEngine, data: Any) -> np.ndarray:
        if engine.manifest.precision == "bf16":
            engines.append(engine)
            raise BackendError("out of memory")
        return predictions(engine, data)

    predictions = fastest._predictions
    monkeypatch.setattr(fastest, "_predictions", predict)
    _, note = build_auto(tmp_path, checkpoint, calibration)
    assert "bf16 (out of memory)" in note
    assert [engine._runner for engine in engines] == [None]


def test_without_an_engine_in_fp32_the_loss_is_still_against_fp32(
    tmp_path: Path, checkpoint: Path, calibration: Quantisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "fp32")
    losses: list[float] = []
    monkeypatch.setattr(fastest, "relative_error", lambda *both: losses.append(error(*both)) or losses[-1])
    assert build_auto(tmp_path, checkpoint, calibration)[0] == "bf16"
    assert 1e-4 < losses[0] < 0.5


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_nothing_within_the_limit(
    tmp_path: Path, checkpoint: Path, calibration: Quantisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "fp32")
    narrow = dataclasses.replace(calibration, max_quality_loss=1e-9)
    message = r"no precision stays within a loss of 0.00%: bf16 loses .*%; left out: fp32 \(the builder gave no plan\)"
    with pytest.raises(QualityLimitError, match=message):
        build_auto(tmp_path, checkpoint, narrow)
    assert not list(tmp_path.iterdir())


def test_nothing_can_be_built(
    tmp_path: Path, checkpoint: Path, calibration: Quantisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "fp32", "bf16")
    with pytest.raises(BackendError, match=r"no precision can be built: fp32 \(the builder gave no plan\); tf32 \("):
        build_auto(tmp_path, checkpoint, calibration)
    assert not list(tmp_path.iterdir())


def test_a_named_precision_is_refused_as_before(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="beyond the range of fp16"):
        build_with(checkpoint, tmp_path / "x.sengine", heads=4, backend="torch", device="cpu", precision="fp16")
