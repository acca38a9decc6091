"""SparseDM's loss: the noise, and what a dense teacher sees of it (arXiv 2404.10445, eq. 7; ``train_c10_lsm3.py``)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Losses(NamedTuple):
    """Of a batch: what is minimised, and its two parts before they are weighted (the second 0 without a teacher)."""

    total: Tensor
    noise: Tensor
    teacher: Tensor


def losses(
    student: Tensor, target: Tensor, teacher: Tensor | None, noise_weight: float = 1.0, teacher_weight: float = 0.1
) -> Losses:
    """noise_weight |target - student|^2 + teacher_weight |teacher - student|^2, means over all elements, in float32.

    Args:
        student, target, teacher: [B, C, H, W].
        noise_weight, teacher_weight: the paper's code has 1 and 0.1.
    """
    noise = (target - student.float()).square().mean()
    taught = noise.new_zeros(()) if teacher is None else (teacher.float() - student.float()).square().mean()
    return Losses(noise_weight * noise + teacher_weight * taught, noise.detach(), taught.detach())


def target_of(prediction: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network has to predict: "eps", "x0", "v" (arXiv 2202.00512, app. D) or "flow" (arXiv 2209.03003).

    x0, noise: [B, C, H, W]; alpha, sigma: [B, 1, 1, 1].
    """
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    return alpha * noise - sigma * x0 if prediction == "v" else noise - x0


def column(values: np.ndarray, device: torch.device) -> Tensor:
    """float64 [B] -> float32 [B, 1, 1, 1]."""
    return torch.from_numpy(values.astype(np.float32)).to(device)[:, None, None, None]
