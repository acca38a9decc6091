"""What a set of timings says, and how sure that is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.99


@dataclass(frozen=True)
class Spread:
    """Milliseconds: the median and how far runs strayed."""

    median: float
    p5: float
    p95: float
    p99: float

    def to_dict(self) -> dict[str, float]:
        """As results files hold it."""
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """A ratio with its interval."""

    median: float
    low: float
    high: float

    @property
    def tie(self) -> bool:
        """Whether the interval cannot tell the two apart."""
        return self.low <= 1.0 <= self.high

    def to_dict(self) -> dict[str, Any]:
        """As results files hold it."""
        return {**asdict(self), "tie": self.tie}

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def spread(seconds: np.ndarray) -> Spread:
    """Of [repeats, rounds] seconds."""
    values = 1e3 * np.percentile(seconds, [50, 5, 95, 99])
    return Spread(*(float(value) for value in values))


def speedup(slow: np.ndarray, fast: np.ndarray, confidence: float = CONFIDENCE) -> Ratio:
    """How many times faster: the median of paired ratios, with a bootstrap interval.

    Args:
        slow, fast: seconds [repeats, rounds]; entry [i, j] of both was measured side by side.
        confidence: of the interval. Repeats are resampled first and rounds within them, so the interval has in it how
            the machine drifts between repeats, which rounds alone do not show.
    """
    ratios = slow / fast
    rng = np.random.default_rng(0)
    repeats, rounds = ratios.shape
    rows = rng.integers(repeats, size=(RESAMPLES, repeats, 1))
    columns = rng.integers(rounds, size=(RESAMPLES, repeats, rounds))
    medians = np.median(ratios[rows, columns].reshape(RESAMPLES, -1), axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(medians, [tail, 100 - tail])
    return Ratio(float(np.median(ratios)), float(low), float(high))


@dataclass(frozen=True)
class Noise:
    """What the timings of one candidate say of the machine.

    Attributes:
        same: the first call of each turn against the second: 1 but for noise.
        drift: the slowest repeat's median over the fastest's.
    """

    same: Ratio
    drift: float

    def to_dict(self) -> dict[str, Any]:
        """As results files hold it."""
        return {"same": self.same.to_dict(), "drift": self.drift}


def noise(seconds: np.ndarray) -> Noise:
    """Of [repeats, calls] seconds, the calls in turns of two."""
    repeats = np.median(seconds, axis=1)
    return Noise(speedup(seconds[:, 0::2], seconds[:, 1::2]), float(repeats.max() / repeats.min()))
