"""What samples are held against, and what is said where that is not to be had."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_engine.bench import inception
from sparse_engine.bench.inception import INCEPTION_WEIGHTS
from sparse_engine.bench.judges import digits_judge, fid_judge, frechet_judge, is_digits, reference_pictures
from sparse_engine.errors import InputError, MissingDependencyError, OptionError, UnsupportedError
from sparse_engine.images import write_samples
from sparse_engine.pruning.data import Canvas
from tests.bench.conftest import DIGITS

CANVAS = Canvas((1, 8, 8), (-1.0, 1.0))


@pytest.fixture
def references(tmp_path: Path, rng: np.random.Generator) -> Path:
    write_samples(tmp_path / "real", [rng.integers(0, 256, (3, 8, 8, 1), np.uint8)])
    return tmp_path / "real"


def test_real_digits_are_read_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DIGITS)
    import data

    images, labels = data.load()
    assert is_digits(CANVAS, 11)
    found = digits_judge(100).judge(images, labels)
    assert found["accuracy"] > 0.99
    assert found["frechet"] == pytest.approx(0, abs=1e-6)
    assert digits_judge(100).judge(images, (labels + 1) % 10)["accuracy"] < 0.02


def test_another_model_is_not_the_digits() -> None:
    assert not is_digits(Canvas((3, 8, 8), (-1.0, 1.0)), 11)
    assert not is_digits(CANVAS, 5)


def test_fid_without_the_package(references: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingDependencyError, match=r"torch_fidelity.*\n.*sparse-engine\[quality\]"):
        fid_judge(CANVAS, references, 10)


def test_fid_without_the_weights(references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", sys)  # anything that can be imported
    monkeypatch.setattr(inception, "PACKAGE", "no_such_package")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UnsupportedError, match=f"Inception weights, and .*{INCEPTION_WEIGHTS} does not exist"):
        fid_judge(CANVAS, references, 10)


def test_fid_gets_the_samples_and_the_references(
    references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
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
    assert fid_judge(CANVAS, references, 5).judge(samples, None) == {"fid": 12.5}
    assert seen["files"] == 5
    assert (seen["input2"], seen["fid"]) == (str(references), True)
    assert seen["feature_extractor_weights_path"] == str(weights)  # never downloaded


def test_folders_and_models_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="two images or more, found 0"):
        fid_judge(CANVAS, tmp_path, 10)
    with pytest.raises(OptionError, match="--reference: this is a latent model"):
        fid_judge(Canvas((4, 8, 8), None), tmp_path, 10, "--reference")


def test_a_distance_in_pixels(references: Path, rng: np.random.Generator) -> None:
    real = reference_pictures(CANVAS, references)
    assert real.shape == (3, 1, 8, 8)
    assert frechet_judge(real, (-1.0, 1.0), 3).judge(real, None)["frechet"] == pytest.approx(0, abs=1e-4)
    shifted = np.clip(real, -1, 0.5) + 0.5
    assert frechet_judge(real, (-1.0, 1.0), 3).judge(shifted, None)["frechet"] > 1
    assert frechet_judge(real, (-1.0, 1.0), 3).judge(real * 100, None)["frechet"] < 1e4  # as pictures: clipped


def test_references_of_another_size(references: Path) -> None:
    with pytest.raises(InputError, match="draws 9x9 pixels, and the pictures are 3 of 8x8"):
        reference_pictures(Canvas((1, 9, 9), (-1.0, 1.0)), references)


class Scripted(torch.nn.Module):
    """Two features of a picture, in place of 2,048."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.mean(dim=(1, 2, 3)), x[:, 0].mean(dim=(1, 2))], dim=1)


def test_a_packages_network_serves_torch_fidelity(
    references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own resize and scale in front; the packaged file is taken for what it is by its hash alone."""
    pytest.importorskip("torch_fidelity")
    package = tmp_path / "site" / "inception_of_a_test"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "PACKAGE", "inception_of_a_test")
    monkeypatch.setattr(inception, "EXTRACTOR", "inception-of-a-test")
    torch.jit.script(Scripted()).save(str(package / inception.PACKAGE_FILE))
    with pytest.raises(UnsupportedError, match=r"is not the network that FID is defined by: its sha256 is"):
        inception.inception()
    digest = hashlib.sha256((package / inception.PACKAGE_FILE).read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "PACKAGE_SHA256", digest)
    real = reference_pictures(CANVAS, references)
    found = fid_judge(CANVAS, references, 3).judge(real, None)["fid"]
    assert found == pytest.approx(0, abs=1e-6)
    darker = fid_judge(CANVAS, references, 3).judge(real - 0.2, None)["fid"]
    assert darker > 0.001
