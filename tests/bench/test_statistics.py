"""The ratio and its interval: what they must and must not claim."""

import time

import numpy as np
import pytest

from sparse_engine.bench.statistics import speedup, spread
from sparse_engine.bench.timing import interleave


def timings(rng: np.random.Generator, ratio: float, drift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A machine whose speed wanders, equally for both, and whose ratio drifts between repeats."""
    machine = np.exp(0.3 * rng.standard_normal((4, 50)))
    noise = np.exp(0.05 * rng.standard_normal((2, 4, 50)))
    wander = np.exp(drift * rng.standard_normal((4, 1)))
    return ratio * machine * noise[0] * wander, machine * noise[1]


def test_paired_ratio_sees_through_a_machine_that_wanders(rng: np.random.Generator) -> None:
    ratio = speedup(*timings(rng, 1.5))
    assert ratio.low < 1.5 < ratio.high
    assert ratio.high - ratio.low < 0.1
    assert not ratio.tie


def test_equal_things_tie(rng: np.random.Generator) -> None:
    ties = sum(speedup(*timings(rng, 1.0)).tie for _ in range(20))
    assert ties >= 18


def test_drift_between_repeats_widens_the_interval(rng: np.random.Generator) -> None:
    steady, drifting = speedup(*timings(rng, 1.2)), speedup(*timings(rng, 1.2, drift=0.2))
    assert drifting.high - drifting.low > 2 * (steady.high - steady.low)


def test_spread() -> None:
    found = spread(np.linspace(0.001, 0.101, 101).reshape(1, -1))
    assert (found.median, found.p5, found.p95) == pytest.approx((51.0, 6.0, 96.0))


def test_interleaving_alternates_and_keeps_warm_up_apart() -> None:
    calls: list[str] = []

    def slow_first(name: str) -> None:
        time.sleep(0.02 if name in calls else 0.1)  # longer than settling takes: one untimed call a turn
        calls.append(name)

    found = interleave({"a": lambda: slow_first("a"), "b": lambda: slow_first("b")}, repeats=2, seconds=0.001)
    assert found.warmup["a"] > 0.1 > found.runs["a"].max()
    assert found.runs["a"].shape == found.runs["b"].shape == (2, found.runs["a"].shape[1])
    assert calls[4:16] == list("aaabbbbbbaaa")
