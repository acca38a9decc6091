"""How good samples are: distances between sets of images, and what a runtime's arithmetic costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_engine.errors import VerificationError
from sparse_engine.images import psnr
from sparse_engine.results import nonfinite_rows

from .similarity import paired
from .workload import Workload

__all__ = ["Judge", "frechet_distance", "measure_quality", "psnr"]

STEPS, SAMPLER = 25, "dpm-solver++"
PSNR_IMAGES = 16
LEAST_BATCH = 16  # of a call: one by one, hundreds of images would take minutes


@dataclass(frozen=True)
class Judge:
    """Something that samples are held against.

    Attributes:
        images: how many samples it takes.
        judge: (float32 [n, C, H, W] in the model's range, labels int64 [n] or None) -> name -> value.
    """

    images: int
    judge: Callable[[np.ndarray, np.ndarray | None], dict[str, float]]


def measure_quality(
    candidates: Mapping[str, Any],
    sample: Callable[[Any, Any, int, str], np.ndarray],
    workload: Workload,
    batch: int,
    judges: Sequence[Judge],
) -> dict[str, Any]:
    """Draw the same seeds with every candidate, without guidance.

    Args:
        candidates: name -> runtime; the first is the fp32 reference.
        sample: (runtime, feed, steps, sampler) -> float32 [batch, C, H, W].
        workload: gives the starting noise and the labels.
        batch: of each call, or ``LEAST_BATCH``.
        judges: what the samples are held against, beside the reference's.

    Returns:
        {"steps", "sampler", "images", "rows": {name: {"psnr": dB against the reference's samples (None for the
        reference and where there is no difference), "ssim" to them (of pixels), ...}}}, or {"psnr": None,
        "nonfinite": how many samples are NaN or infinite}

    Raises:
        VerificationError: the reference itself draws NaN.
    """
    images = max([PSNR_IMAGES, *(judge.images for judge in judges)])
    batch = max(batch, LEAST_BATCH)
    starts = range(0, images, batch)
    labels = workload.model.labels(images)
    rows: dict[str, dict[str, float | None]] = {}
    expected: np.ndarray | None = None
    for name, candidate in candidates.items():
        feeds = (workload.feed(np.arange(start, start + batch)) for start in starts)
        drawn = np.concatenate([sample(candidate, feed, STEPS, SAMPLER) for feed in feeds])[:images]
        broken = nonfinite_rows(drawn)
        if len(broken):
            if expected is None:
                raise VerificationError(f"{name}: {len(broken)} of {images} samples are NaN or infinite")
            rows[name] = {"psnr": None, "nonfinite": len(broken)}
            continue
        expected = drawn if expected is None else expected
        value_range = workload.model.recipe.value_range or (float(expected.min()), float(expected.max()))
        distance = psnr(drawn, expected, value_range)
        rows[name] = {"psnr": distance if np.isfinite(distance) else None}
        if drawn is not expected and workload.model.recipe.value_range is not None:
            rows[name]["ssim"] = float(paired(drawn, expected, value_range)["ssim"].mean())
        for judge in judges:
            rows[name] |= judge.judge(drawn, labels)
    return {"steps": STEPS, "sampler": SAMPLER, "images": images, "rows": rows}


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of feature vectors.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the quantity that FID computes on Inception features.

    Args:
        a, b: [n, features] and [m, features], in the same units; the result is in those units squared.

    Source: Dowson and Landau 1982; Heusel et al., arXiv 1706.08500, eq. 6.
    """
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))  # whose covariances are x^T x
    # tr (C_a C_b)^(1/2) is the sum of the singular values of a b^T.
    if min(len(a), len(b)) > a.shape[1]:
        a, b = (np.asarray(np.linalg.qr(x, mode="r")) for x in (a, b))  # as many rows as features, and the same x^T x
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(mean + np.square(a).sum() + np.square(b).sum() - 2 * cross)
