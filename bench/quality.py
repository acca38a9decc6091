"""How good samples are: distances between sets of images, and between trajectories."""

from __future__ import annotations

import numpy as np

from sparse_engine.images import psnr

__all__ = ["frechet_distance", "psnr"]


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of feature vectors.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the quantity that FID computes on Inception features.

    Args:
        a, b: [n, features] and [m, features], in the same units; the result is in those units squared.

    Source: Dowson and Landau 1982; Heusel et al., arXiv 1706.08500, eq. 6.
    """
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    cov_a, cov_b = (np.cov(x, rowvar=False) for x in (a, b))
    # tr (C_a C_b)^(1/2) = sum of the square roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    return float(mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
