"""What the sampler tests compare against: the step formula in float64, and models with known answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_engine.sampling import Schedule, Trajectory

Model = Callable[[np.ndarray, float], np.ndarray]  # (x, schedule time) -> prediction


def run(
    trajectory: Trajectory,
    model: Model,
    x: np.ndarray,
    noise: Callable[[int], np.ndarray] | None = None,
    dtype: type = np.float64,
) -> np.ndarray:
    """The step formula of DESIGN.md section 4, one row after another, rows and states in ``dtype``."""
    low, high = trajectory.clip
    x = x.astype(dtype)
    base, h1, h2 = x, np.zeros_like(x), np.zeros_like(x)
    for i, (c, t) in enumerate(zip(trajectory.coef.astype(dtype), trajectory.times, strict=True)):
        if trajectory.rebase[i]:
            base = x
        eps: np.ndarray = model(x, t).astype(dtype)
        m = np.clip(c[0] * x + c[1] * eps, low, high)
        z = noise(i + 1).astype(dtype) if c[7] and noise is not None else np.zeros_like(x)
        x = c[2] * x + c[3] * base + c[4] * m + c[5] * h1 + c[6] * h2 + c[7] * z
        h2, h1 = h1, m
    return x


@dataclass(frozen=True)
class Gaussian:
    """Data drawn from N(mean, std²), of which the best prediction and the exact ODE are known."""

    schedule: Schedule
    mean: float = 0.4
    std: float = 0.3

    def moments(self, t: float) -> tuple[float, float]:
        """Mean and variance of x_t."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return float(alpha * self.mean), float(alpha**2 * self.std**2 + sigma**2)

    def eps(self, x: np.ndarray, t: float) -> np.ndarray:
        mean, variance = self.moments(t)
        return float(self.schedule.sigma(t)) * (x - mean) / variance

    def x0(self, x: np.ndarray, t: float) -> np.ndarray:
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        mean, variance = self.moments(t)
        return self.mean + alpha * self.std**2 * (x - mean) / variance if sigma else x

    def v(self, x: np.ndarray, t: float) -> np.ndarray:
        return self.schedule.alpha(t) * self.eps(x, t) - self.schedule.sigma(t) * self.x0(x, t)

    def predict(self, prediction: str) -> Model:
        return {"eps": self.eps, "x0": self.x0, "v": self.v}[prediction]

    def flow(self, x: np.ndarray, t: float, s: float) -> np.ndarray:
        """The probability-flow ODE from t to s, exactly."""
        (mean_t, variance_t), (mean_s, variance_s) = self.moments(t), self.moments(s)
        return mean_s + np.sqrt(variance_s / variance_t) * (x - mean_t)


def propagate(trajectory: Trajectory, gaussian: Gaussian) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of x before each call and after the last, [S + 1], carried through the rows.

    The Gaussian's eps is affine in x, so a row is an affine map of (x, base, h1, h2) and a fresh z: no
    sampling. x starts from its exact distribution.
    """
    mean_x, variance_x = gaussian.moments(trajectory.times[0])
    mean = np.array([mean_x, mean_x, 0.0, 0.0])
    covariance = np.zeros((4, 4))
    covariance[:2, :2] = variance_x
    means, variances = [mean_x], [variance_x]
    for c, t, rebase in zip(trajectory.coef, trajectory.times, trajectory.rebase, strict=True):
        if rebase:
            copy = np.eye(4)
            copy[1] = [1, 0, 0, 0]
            mean, covariance = copy @ mean, copy @ covariance @ copy.T
        offset = float(gaussian.eps(np.zeros(()), t))
        slope = float(gaussian.eps(np.ones(()), t)) - offset
        m, m_offset = c[0] + c[1] * slope, c[1] * offset
        step = np.array([[c[2] + c[4] * m, c[3], c[5], c[6]], [0, 1, 0, 0], [m, 0, 0, 0], [0, 0, 1, 0]], np.float64)
        mean = step @ mean + [c[4] * m_offset, 0, m_offset, 0]
        covariance = step @ covariance @ step.T
        covariance[0, 0] += c[7] ** 2
        means.append(mean[0])
        variances.append(covariance[0, 0])
    return np.array(means), np.array(variances)


def bent(x: Any, n: Any) -> Any:
    """A nonlinear eps that depends on the time n in 0..1000; of x, NumPy or Torch."""
    return 0.6 * x + 0.3 * (x * (1.0 + n / 1000.0)).clip(-0.8, 0.8) + 0.1 * (1.0 - n / 500.0)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))
