"""What samples are held against, and what is said where that is not to be had."""

import sys
from pathlib import Path

import numpy as np
import pytest

from sparse_engine.bench.judges import INCEPTION_WEIGHTS, digits_judge, fid_judge, is_digits
from sparse_engine.errors import MissingDependencyError, OptionError, UnsupportedError
from sparse_engine.export.model import Model, load_model
from sparse_engine.images import write_samples
from tests.bench.conftest import DIGITS
from tests.conftest import TINY_LATENT, save_checkpoint


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(DIGITS / "sparsedm.pth")


@pytest.fixture
def references(tmp_path: Path, rng: np.random.Generator) -> Path:
    write_samples(tmp_path / "real", [rng.integers(0, 256, (3, 8, 8, 1), np.uint8)])
    return tmp_path / "real"


def test_real_digits_are_read_right(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DIGITS)
    import data

    images, labels = data.load()
    assert is_digits(model)
    found = digits_judge(100).judge(images, labels)
    assert found["accuracy"] > 0.99
    assert found["frechet"] == pytest.approx(0, abs=1e-6)
    assert digits_judge(100).judge(images, (labels + 1) % 10)["accuracy"] < 0.02


def test_another_model_is_not_the_digits(conditional_checkpoint: Path) -> None:
    assert not is_digits(load_model(conditional_checkpoint, heads=4))


def test_fid_without_the_package(model: Model, references: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingDependencyError, match=r"torch_fidelity.*\n.*sparse-engine\[quality\]"):
        fid_judge(model, references, 10)


def test_fid_without_the_weights(
    model: Model, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", sys)  # anything that can be imported
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UnsupportedError, match=f"Inception weights, and .*{INCEPTION_WEIGHTS} does not exist"):
        fid_judge(model, references, 10)


def test_fid_gets_the_samples_and_the_references(
    model: Model, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    seen = {}

    class Fidelity:
        @staticmethod
        def calculate_metrics(**options: object) -> dict[str, float]:
            seen.update(options, files=len(list(Path(str(options["input1"])).glob("*.png"))))
            return {"frechet_inception_distance": 12.5}

    weights = tmp_path / "hub" / "checkpoints" / INCEPTION_WEIGHTS
    weights.parent.mkdir(parents=True)
    weights.touch()
    monkeypatch.setitem(sys.modules, "torch_fidelity", Fidelity)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    samples = rng.uniform(-1, 1, (5, 1, 8, 8)).astype(np.float32)
    assert fid_judge(model, references, 5).judge(samples, None) == {"fid": 12.5}
    assert seen["files"] == 5
    assert (seen["input2"], seen["fid"]) == (str(references), True)
    assert seen["feature_extractor_weights_path"] == str(weights)  # never downloaded


def test_folders_and_models_without_pictures(model: Model, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="two images or more, found 0"):
        fid_judge(model, tmp_path, 10)
    latent = load_model(save_checkpoint(tmp_path / "latent.pth", TINY_LATENT), heads=4)
    with pytest.raises(OptionError, match="latent model"):
        fid_judge(latent, tmp_path, 10)
