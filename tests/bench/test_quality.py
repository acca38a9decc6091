"""Distances with known answers."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import linalg

from sparse_engine.bench.quality import Judge, frechet_distance, measure_quality, psnr
from sparse_engine.bench.report.tables import quality_text
from sparse_engine.errors import VerificationError


def test_frechet_of_gaussians_with_known_moments(rng: np.random.Generator) -> None:
    x = rng.standard_normal((400, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T  # mean 0, covariance 1, exactly
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + np.array([3, 0, 4])) == pytest.approx(25)
    assert frechet_distance(x, 3 * x) == pytest.approx(3 * (3 - 1) ** 2)


def test_frechet_is_the_textbook_formula(rng: np.random.Generator) -> None:
    a = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6))
    b = rng.standard_normal((400, 6)) @ rng.standard_normal((6, 6)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_constant_pixels(rng: np.random.Generator) -> None:
    """Digits have corners that are always black: singular covariances."""
    a = np.concatenate([rng.standard_normal((50, 4)), np.full((50, 2), -1.0)], axis=1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_psnr() -> None:
    a = np.zeros((2, 3), np.float32)
    assert psnr(a + 0.1, a, (-1.0, 1.0)) == pytest.approx(10 * np.log10(4 / 0.01), rel=1e-5)
    assert psnr(a, a, (-1.0, 1.0)) == float("inf")


class Drawn:
    """A workload, and candidates that draw what they are called."""

    model = SimpleNamespace(recipe=SimpleNamespace(value_range=(-1.0, 1.0)), labels=lambda n: None)

    def feed(self, images: np.ndarray) -> np.ndarray:
        return images

    @staticmethod
    def sample(candidate: float, images: Any, steps: int, sampler: str) -> np.ndarray:
        drawn = np.zeros((len(images), 1, 2, 2), np.float32)
        drawn[images == 3] = candidate
        return drawn


def measured(**candidates: float) -> dict[str, Any]:
    workload: Any = Drawn()
    judges = [Judge(16, lambda drawn, labels: {"fid": float(drawn.mean())})]
    rows: dict[str, Any] = measure_quality(candidates, Drawn.sample, workload, 16, judges)["rows"]
    return rows


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_not_the_same_picture(value: float) -> None:
    rows = measured(reference=0.0, same=0.0, diverged=value, other=0.5)
    assert rows["same"]["psnr"] is None
    assert rows["diverged"] == {"psnr": None, "nonfinite": 1}
    assert rows["other"]["psnr"] < 40
    assert quality_text(rows["diverged"]) == "NaN in 1 images"
    assert quality_text(rows["same"]).startswith("identical")


def test_a_reference_that_diverges_is_an_error() -> None:
    with pytest.raises(VerificationError, match="reference: 1 of 16 samples are NaN or infinite"):
        measured(reference=float("nan"), other=0.0)
