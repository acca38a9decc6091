"""The samplers that U-ViT and SparseDM evaluate with, against plain float64 transcriptions of their updates."""

from typing import Any

import numpy as np
import pytest
from oracles import bent, relative_error, run

from sparse_engine.sampling import Schedule, StableDiffusion, VPCosine, VPLinear, make_trajectory

SHAPE = (2, 3, 4, 4)


def _start() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE)


def _noise(draw: int) -> np.ndarray:
    return np.random.default_rng([1, draw]).standard_normal(SHAPE)


class Vp:
    """VP-SDE with beta 0.1..20, written out once more."""

    @staticmethod
    def beta(t: Any) -> Any:
        return 0.1 + 19.9 * t

    @staticmethod
    def alpha(t: Any) -> Any:
        return np.exp(-0.5 * (0.1 * t + 9.95 * t * t))

    @staticmethod
    def sigma(t: Any) -> Any:
        return np.sqrt(1 - Vp.alpha(t) ** 2)

    @staticmethod
    def lam(t: Any) -> Any:
        return np.log(Vp.alpha(t) / Vp.sigma(t))

    @staticmethod
    def time(lam: float) -> float:
        """By bisection, so that no formula is shared."""
        low, high = 1e-9, 1.0
        for _ in range(200):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if Vp.lam(middle) > lam else (low, middle)
        return 0.5 * (low + high)

    @staticmethod
    def eps(x: np.ndarray, t: float) -> np.ndarray:
        return bent(x, 999 * t)


@pytest.mark.parametrize("steps", [2, 10, 50])
@pytest.mark.parametrize("kind", ["sde", "ode"])
def test_euler_is_the_authors(kind: str, steps: int) -> None:
    x, times = _start(), np.append(0.0, np.linspace(1e-3, 1.0, steps))
    for i, (t, s) in enumerate(zip(times[:0:-1], times[-2::-1], strict=True)):
        score = -Vp.eps(x, t) / Vp.sigma(t)
        weight = 1.0 if kind == "sde" else 0.5
        drift = -0.5 * Vp.beta(t) * x - weight * Vp.beta(t) * score
        x = x + drift * (s - t)
        if kind == "sde" and s != 0:
            x = x + np.sqrt(Vp.beta(t) * (t - s)) * _noise(i + 1)
    trajectory = make_trajectory(f"euler-{kind}", VPLinear(), steps)
    np.testing.assert_allclose(trajectory.times, times[:0:-1], rtol=1e-14)
    assert relative_error(run(trajectory, Vp.eps, _start(), _noise), x) < 1e-10


def test_euler_sde_draws_noise_at_every_step_but_the_last() -> None:
    drawn = make_trajectory("euler-sde", VPLinear(), 50).coef[:, 7]
    assert np.all(drawn[:-1] > 0)
    assert drawn[-1] == 0


def _dpm_1(x: np.ndarray, s: float, t: float, eps: np.ndarray) -> np.ndarray:
    h = Vp.lam(t) - Vp.lam(s)
    return Vp.alpha(t) / Vp.alpha(s) * x - Vp.sigma(t) * np.expm1(h) * eps


def _dpm_2(x: np.ndarray, s: float, t: float) -> np.ndarray:
    h, eps = Vp.lam(t) - Vp.lam(s), Vp.eps(x, s)
    middle = Vp.time(Vp.lam(s) + h / 2)
    return _dpm_1(x, s, t, Vp.eps(_dpm_1(x, s, middle, eps), middle))


def _dpm_3(x: np.ndarray, s: float, t: float) -> np.ndarray:
    h, eps = Vp.lam(t) - Vp.lam(s), Vp.eps(x, s)
    one, two = Vp.time(Vp.lam(s) + h / 3), Vp.time(Vp.lam(s) + 2 * h / 3)
    d_one = Vp.eps(_dpm_1(x, s, one, eps), one) - eps
    x_two = _dpm_1(x, s, two, eps) - 2 * Vp.sigma(two) * (np.expm1(2 * h / 3) / (2 * h / 3) - 1) * d_one
    d_two = Vp.eps(x_two, two) - eps
    return _dpm_1(x, s, t, eps) - 1.5 * Vp.sigma(t) * (np.expm1(h) / h - 1) * d_two


FAST_ORDERS = {
    1: [1],
    2: [2],
    3: [2, 1],
    4: [3, 1],
    5: [3, 2],
    6: [3, 2, 1],
    20: [3] * 6 + [2],
    50: [3] * 16 + [2],
}


@pytest.mark.parametrize("steps", FAST_ORDERS)
def test_dpm_solver_is_the_authors_fast_version(steps: int) -> None:
    orders = FAST_ORDERS[steps]
    lams = np.linspace(Vp.lam(1.0), Vp.lam(1e-4), len(orders) + 1)
    times = [1.0, *(Vp.time(lam) for lam in lams[1:-1]), 1e-4]
    x, updates = _start(), {1: lambda x, s, t: _dpm_1(x, s, t, Vp.eps(x, s)), 2: _dpm_2, 3: _dpm_3}
    for order, s, t in zip(orders, times[:-1], times[1:], strict=True):
        x = updates[order](x, s, t)
    trajectory = make_trajectory("dpm-solver", VPLinear(), steps)
    assert len(trajectory) == steps
    assert relative_error(run(trajectory, Vp.eps, _start()), x) < 1e-9


def _latent_fast(steps: int, schedule: Schedule) -> np.ndarray:
    """U-ViT-H's latent evaluation: predicted x0, one time-uniform grid from 1 to 1/N, network time N t."""

    def x0(x: np.ndarray, t: float) -> np.ndarray:
        eps = bent(x, 1000 * t)
        return (x - schedule.sigma(t) * eps) / schedule.alpha(t)

    def phi(h: float) -> float:
        return float(np.expm1(-h) / h + 1)

    def first(x: np.ndarray, s: float, t: float, d: np.ndarray) -> np.ndarray:
        h = schedule.lambda_(t) - schedule.lambda_(s)
        return schedule.sigma(t) / schedule.sigma(s) * x - schedule.alpha(t) * np.expm1(-h) * d

    x, times, i = _start(), np.linspace(1.0, 1e-3, steps + 1), 0
    for order in FAST_ORDERS[steps]:
        s, t = times[i], times[i + order]
        lam = schedule.lambda_(times[i : i + order + 1]) - schedule.lambda_(s)
        h, d = lam[-1], x0(x, s)
        y = first(x, s, t, d)
        if order > 1:
            d_one = x0(first(x, s, times[i + 1], d), times[i + 1]) - d
        if order == 2:
            y = y - 0.5 / (lam[1] / h) * schedule.alpha(t) * np.expm1(-h) * d_one
        if order == 3:
            two = times[i + 2]
            x_two = first(x, s, two, d) + lam[2] / lam[1] * schedule.alpha(two) * phi(lam[2]) * d_one
            y = y + 1 / (lam[2] / h) * schedule.alpha(t) * phi(h) * (x0(x_two, two) - d)
        x, i = y, i + order
    return x


@pytest.mark.parametrize("steps", FAST_ORDERS)
def test_dpm_solver_pp_singlestep_is_the_authors_latent_evaluation(steps: int) -> None:
    schedule = StableDiffusion()
    trajectory = make_trajectory("dpm-solver++-singlestep", schedule, steps)
    np.testing.assert_allclose(trajectory.network_times, np.linspace(1000.0, 1.0, steps + 1)[:-1], rtol=1e-12)
    found = run(trajectory, lambda x, t: bent(x, 1000 * t), _start())
    assert relative_error(found, _latent_fast(steps, schedule)) < 1e-9


def test_pixel_models_get_999_t_at_every_stage() -> None:
    trajectory = make_trajectory("dpm-solver", VPLinear(), 50)
    np.testing.assert_allclose(trajectory.network_times, 999 * trajectory.times, rtol=1e-15)
    assert trajectory.network_times[0] == 999.0
    assert np.all(np.diff(trajectory.times) < 0)


def test_the_cosine_schedule_starts_at_its_own_end() -> None:
    for sampler in ("dpm-solver", "dpm-solver++", "euler-sde", "ddim"):
        assert make_trajectory(sampler, VPCosine(), 10).times[0] == 0.9946
