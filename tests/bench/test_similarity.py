"""How like two pictures are: against the formulas, picture by picture."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from sparse_engine.bench.similarity import LPIPS_FILES, lpips, paired, paired_psnr, paired_ssim

RANGE = (-1.0, 1.0)


def ssim(a: np.ndarray, b: np.ndarray, side: int) -> float:
    """Of one picture [C, H, W], place by place, as Wang et al. write it; pixels 0..1."""
    at = np.arange(side) - side // 2
    window = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for channel in range(a.shape[0]):
        for top in range(a.shape[1] - side + 1):
            for left in range(a.shape[2] - side + 1):
                x, y = (each[channel, top : top + side, left : left + side] for each in (a, b))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                c1, c2 = 0.01**2, 0.03**2
                found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize("size, side", [(14, 11), (8, 7), (5, 5)])
def test_ssim(rng: np.random.Generator, size: int, side: int) -> None:
    a = rng.uniform(-1, 1, (3, 2, size, size))
    b = (a + 0.3 * rng.standard_normal(a.shape)).clip(-1, 1)
    expected = [ssim((x + 1) / 2, (y + 1) / 2, side) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(paired_ssim(a, b, RANGE), expected, rtol=1e-9)
    np.testing.assert_allclose(paired_ssim(a, a, RANGE), 1)


def test_psnr_is_a_picture_at_a_time() -> None:
    a = np.zeros((3, 1, 4, 4), np.float32)
    b = a + np.array([0, 0.1, 1], np.float32)[:, None, None, None]
    np.testing.assert_allclose(paired_psnr(b, a, RANGE), [100, 10 * np.log10(4 / 0.01), 10 * np.log10(4)], rtol=1e-5)


def test_latents_have_psnr_alone(rng: np.random.Generator) -> None:
    expected = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    found = paired(expected + 0.1, expected, None)
    assert found.keys() == {"psnr"}
    peak = float(expected.max() - expected.min())
    np.testing.assert_allclose(found["psnr"], 10 * np.log10(peak**2 / 0.01), rtol=1e-4)


def test_lpips_needs_weights_and_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert lpips() is None
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name in LPIPS_FILES:
        (folder / name).touch()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.sample_similarity_lpips", None)
    assert lpips() is None


def test_lpips_is_of_each_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    class Similarity:
        SampleSimilarityLPIPS = staticmethod(
            lambda name: lambda a, b: (a.float() - b.float()).abs().mean(dim=(1, 2, 3), keepdim=True)
        )

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name in LPIPS_FILES:
        (folder / name).touch()
    monkeypatch.setitem(sys.modules, "torch_fidelity", Similarity)
    monkeypatch.setitem(sys.modules, "torch_fidelity.sample_similarity_lpips", Similarity)
    measure = lpips()
    assert measure is not None
    a = rng.integers(0, 100, (20, 8, 8, 3), np.uint8)
    shift = np.arange(20, dtype=np.uint8)
    np.testing.assert_allclose(measure(a + shift[:, None, None, None], a), shift)
