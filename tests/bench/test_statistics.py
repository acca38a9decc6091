"""The ratio and its interval: what they must and must not claim."""

import numpy as np
import pytest

from sparse_engine.bench.statistics import noise, speedup, spread


def timings(rng: np.random.Generator, ratio: float, drift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A machine whose speed wanders, equally for both, and whose ratio drifts between repeats."""
    machine = np.exp(0.3 * rng.standard_normal((4, 50)))
    calls = np.exp(0.05 * rng.standard_normal((2, 4, 50)))
    wander = np.exp(drift * rng.standard_normal((4, 1)))
    return ratio * machine * calls[0] * wander, machine * calls[1]


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


def test_interval_holds_what_it_promises(rng: np.random.Generator) -> None:
    """Six repeats of four calls whose ratio shifts by 1 % from load to load: 99 of 100 intervals hold the truth."""
    inside = 0
    for _ in range(200):
        shift = np.exp(0.01 * rng.standard_normal((6, 1)))
        calls = np.exp(0.03 * rng.standard_t(4, (6, 4)))
        inside += speedup(shift * calls, np.ones((6, 4))).tie
    assert inside >= 192


def test_noise_of_one_candidate() -> None:
    steady = noise(np.array([[1.0, 1.0, 1.1, 1.1], [2.0, 2.0, 2.2, 2.2]]))
    assert steady.same.median == 1.0
    assert steady.drift == pytest.approx(2.0)
    assert noise(np.array([[2.0, 1.0, 2.0, 1.0]])).same.median == 2.0  # a first call that is always slower
