"""How like two pictures are that were drawn from the same noise: PSNR, SSIM, LPIPS."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine.results import to_uint8

MOST_PSNR = 100.0  # dB, of two pictures that do not differ
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM, as published
LPIPS_FILES = ("weights-vgg16-lpips.pth", "vgg16-397923af.pth")  # torch-fidelity's and torchvision's
LPIPS_BATCH = 16


def paired(
    found: np.ndarray,
    expected: np.ndarray,
    value_range: tuple[float, float] | None,
    perceptual: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Each picture against its twin: "psnr" in dB, "ssim", and "lpips" where it can be had; float64 [n].

    Args:
        found, expected: float32 [n, C, H, W], of the same seeds.
        value_range: of pixels; None for latents, which have PSNR alone, with what is expected for its range.
        perceptual: what ``lpips`` gives.
    """
    if value_range is None:
        return {"psnr": paired_psnr(found, expected, (float(expected.min()), float(expected.max())))}
    apart = {"psnr": paired_psnr(found, expected, value_range), "ssim": paired_ssim(found, expected, value_range)}
    if perceptual is not None:
        apart["lpips"] = perceptual(to_uint8(found, value_range), to_uint8(expected, value_range))
    return apart


def paired_psnr(found: np.ndarray, expected: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """PSNR of each picture in dB, float64 [n]; 100 where two do not differ. found, expected: [n, C, H, W]."""
    error = np.square(found.astype(np.float64) - expected.astype(np.float64)).mean(axis=(1, 2, 3))
    peak = (value_range[1] - value_range[0]) ** 2
    return 10 * np.log10(peak / np.maximum(error, peak * 10 ** (-MOST_PSNR / 10)))


def paired_ssim(found: np.ndarray, expected: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Structural similarity of each picture, float64 [n]: the mean over channels and places.

    A Gaussian window of 11 x 11 and sigma 1.5, places where it fits alone; smaller pictures have the largest odd window
    that fits. found, expected: [n, C, H, W].

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004.
    """
    low, high = value_range
    c1, c2 = (K1 * (high - low)) ** 2, (K2 * (high - low)) ** 2
    a, b = found.astype(np.float64) - low, expected.astype(np.float64) - low
    side = min(WINDOW, *found.shape[2:])
    blurred = _blur(side - (side + 1) % 2)
    mu_a, mu_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mu_a**2, blurred(b * b) - mu_b**2
    covariance = blurred(a * b) - mu_a * mu_b
    top = (2 * mu_a * mu_b + c1) * (2 * covariance + c2)
    return (top / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))).mean(axis=(1, 2, 3))


def _blur(side: int) -> Callable[[np.ndarray], np.ndarray]:
    """A Gaussian of ``side`` x ``side``, where it fits: [..., H, W] -> [..., H - side + 1, W - side + 1]."""
    weights = np.exp(-0.5 * np.square((np.arange(side) - side // 2) / SIGMA))
    weights /= weights.sum()

    def blur(x: np.ndarray) -> np.ndarray:
        for axis in (-1, -2):
            x = np.lib.stride_tricks.sliding_window_view(x, side, axis=axis) @ weights
        return x

    return blur


def lpips_weights() -> list[Path]:
    """The files that LPIPS needs, whether they are there or not; nothing is ever downloaded."""
    import torch

    return [Path(torch.hub.get_dir()) / "checkpoints" / name for name in LPIPS_FILES]


def lpips() -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """LPIPS by VGG-16 of each of some pairs, uint8 [n, H, W, 3] -> float64 [n]; None where package or weights lack.

    Source: Zhang et al., arXiv 1801.03924, version 0.1, as torch-fidelity computes it.
    """
    if not all(path.is_file() for path in lpips_weights()):
        return None
    try:
        network: Any = importlib.import_module("torch_fidelity.sample_similarity_lpips").SampleSimilarityLPIPS("lpips")
    except ModuleNotFoundError:
        return None
    import torch

    def measure(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
        values = []
        with torch.no_grad():
            for first in range(0, len(found), LPIPS_BATCH):
                part = slice(first, first + LPIPS_BATCH)
                a, b = (torch.from_numpy(x[part].transpose(0, 3, 1, 2).copy()) for x in (found, expected))
                values.append(network(a, b).flatten().double().numpy())
        return np.concatenate(values)

    return measure
