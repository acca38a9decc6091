"""Distances with known answers."""

import numpy as np
import pytest
from scipy import linalg

from sparse_engine.bench.quality import frechet_distance, psnr


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
