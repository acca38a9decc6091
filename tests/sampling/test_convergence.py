"""Samplers on a Gaussian, of which the exact score, ODE and moments at every time are known."""

from typing import Any

import numpy as np
import pytest
from oracles import Gaussian, propagate, run

from sparse_engine.sampling import DiscreteBetas, Schedule, Trajectory, VPCosine, VPLinear, make_trajectory

START = np.linspace(-2.0, 2.0, 9).reshape(1, 1, 3, 3)


def _order(errors: list[float]) -> float:
    """The slope of log2 error over doublings of the steps, from the finest two."""
    return float(np.log2(errors[-2] / errors[-1]))


def _ode_error(sampler: str, steps: int, schedule: Schedule, t_end: float = 1e-3, **options: Any) -> float:
    gaussian = Gaussian(schedule)
    trajectory = make_trajectory(
        sampler, schedule, steps, t_end=t_end, denoise_to_zero=False, spacing="logsnr-uniform", **options
    )
    exact = gaussian.flow(START, trajectory.times[0], t_end)
    return float(np.max(np.abs(run(trajectory, gaussian.eps, START) - exact)))


@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine()], ids=["vp-linear", "vp-cosine"])
@pytest.mark.parametrize(
    "sampler, options, steps, order",
    [
        ("euler-ode", {}, [200, 400, 800], 1),
        ("ddim", {}, [80, 160, 320], 1),
        ("dpm-solver", {"order": 1}, [80, 160, 320], 1),
        ("dpm-solver", {"order": 2}, [80, 160, 320], 2),
        # A multiple of three plus two, so that the last solver step is of second order, not of first.
        ("dpm-solver", {"order": 3}, [80, 161, 323], 3),
        ("dpm-solver++-singlestep", {"order": 1}, [80, 160, 320], 1),
        ("dpm-solver++-singlestep", {"order": 2}, [80, 160, 320], 2),
        ("dpm-solver++-singlestep", {"order": 3}, [80, 161, 323], 3),
        ("dpm-solver++", {"order": 1}, [80, 160, 320], 1),
        ("dpm-solver++", {"order": 2}, [80, 160, 320], 2),
        ("dpm-solver++", {"order": 3}, [80, 160, 320], 2),
    ],
)
def test_order_of_convergence(
    sampler: str, options: dict[str, Any], steps: list[int], order: int, schedule: Schedule
) -> None:
    errors = [_ode_error(sampler, n, schedule, **options) for n in steps]
    assert _order(errors) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("options", [{"order": 1}, {"order": 2}, {"order": 3}])
@pytest.mark.parametrize("sampler", ["dpm-solver", "dpm-solver++", "dpm-solver++-singlestep"])
def test_prediction_changes_nothing_of_the_solvers(sampler: str, options: dict[str, Any], prediction: str) -> None:
    _same_as_eps(sampler, VPLinear(), prediction, **options)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), DiscreteBetas()], ids=lambda s: s.name)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler-sde", "euler-ode", "sde-dpm-solver++"])
def test_prediction_changes_nothing(sampler: str, schedule: Schedule, prediction: str) -> None:
    _same_as_eps(sampler, schedule, prediction)


def _same_as_eps(sampler: str, schedule: Schedule, prediction: str, **options: Any) -> None:
    gaussian = Gaussian(schedule)

    def noise(draw: int) -> np.ndarray:
        return np.random.default_rng(draw).standard_normal(START.shape)

    eps = make_trajectory(sampler, schedule, 10, **options)
    other = make_trajectory(sampler, schedule, 10, prediction=prediction, **options)
    np.testing.assert_allclose(
        run(other, gaussian.predict(prediction), START, noise),
        run(eps, gaussian.eps, START, noise),
        rtol=1e-9,
        atol=1e-12,
    )


# --- Stochastic samplers: mean and variance carried through the rows, nothing drawn. ---


def _exact(gaussian: Gaussian, trajectory: Trajectory, end: float) -> np.ndarray:
    return np.array([gaussian.moments(t) for t in np.append(trajectory.times, end)]).T


@pytest.mark.parametrize(
    "sampler, options, std",
    [
        # Ho et al. 2020, section 3.2: the small variance is exact for one image, the large one for N(0, I).
        ("ddpm", {"variance": "small"}, 0.0),
        ("ddpm", {"variance": "large"}, 1.0),
        # Song et al. 2021, lemma 1: DDIM keeps every marginal for one image, whatever eta.
        ("ddim", {"eta": 0.0}, 0.0),
        ("ddim", {"eta": 0.3}, 0.0),
        ("ddim", {"eta": 1.0}, 0.0),
        ("sde-dpm-solver++", {"order": 1, "denoise_to_zero": False, "t_end": 1e-3}, 0.0),
        ("sde-dpm-solver++", {"order": 2, "denoise_to_zero": False, "t_end": 1e-3}, 0.0),
    ],
)
@pytest.mark.parametrize("schedule", [VPLinear(), DiscreteBetas()], ids=lambda s: s.name)
def test_marginals_that_are_exact_at_any_number_of_steps(
    sampler: str, options: dict[str, Any], std: float, schedule: Schedule
) -> None:
    gaussian = Gaussian(schedule, mean=0.4 if std == 0 else 0.0, std=std)
    trajectory = make_trajectory(sampler, schedule, 7, **options)
    mean, variance = propagate(trajectory, gaussian)
    exact_mean, exact_variance = _exact(gaussian, trajectory, options.get("t_end", 0.0))
    np.testing.assert_allclose(mean, exact_mean, rtol=0, atol=1e-9)
    # The step to the image draws nothing, so N(0, I) loses its variance there and only there.
    last = None if std == 0 else -1
    np.testing.assert_allclose(variance[:last], exact_variance[:last], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "sampler, options, order",
    [
        ("ddpm", {"variance": "small"}, 1),
        ("ddpm", {"variance": "large"}, 1),
        ("ddim", {"eta": 1.0}, 1),
        ("euler-sde", {}, 1),
        ("sde-dpm-solver++", {"order": 1}, 1),
        ("sde-dpm-solver++", {"order": 2}, 2),
    ],
)
def test_variance_converges_to_the_data_s(sampler: str, options: dict[str, Any], order: int) -> None:
    schedule, t_end = VPLinear(), 0.02
    gaussian = Gaussian(schedule)
    errors = []
    for steps in (160, 320, 640):
        trajectory = make_trajectory(
            sampler, schedule, steps, spacing="logsnr-uniform", t_end=t_end, denoise_to_zero=False, **options
        )
        mean, variance = propagate(trajectory, gaussian)
        exact_mean, exact_variance = _exact(gaussian, trajectory, t_end)
        errors.append(abs(variance[-1] - exact_variance[-1]))
        np.testing.assert_allclose(mean, exact_mean, rtol=0, atol=0.05)
    assert errors[-1] < 0.02 * exact_variance[-1]
    assert _order(errors) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), DiscreteBetas()], ids=lambda s: s.name)
def test_ddpm_ddim_and_the_sde_solver_meet(schedule: Schedule) -> None:
    ddpm = make_trajectory("ddpm", schedule, 9, t_end=1e-3, denoise_to_zero=False)
    for other in (
        make_trajectory("ddim", schedule, 9, eta=1.0, t_end=1e-3, denoise_to_zero=False),
        make_trajectory("sde-dpm-solver++", schedule, 9, order=1, t_end=1e-3, denoise_to_zero=False),
    ):
        np.testing.assert_allclose(other.coef, ddpm.coef, rtol=1e-9, atol=1e-13)


def test_ddim_is_first_order_dpm_solver() -> None:
    gaussian = Gaussian(VPLinear())
    cases: list[tuple[str, dict[str, Any]]] = [
        ("ddim", {}),
        ("dpm-solver", {"order": 1}),
        ("dpm-solver++", {"order": 1}),
        ("dpm-solver++-singlestep", {"order": 1}),
    ]
    found = [
        run(make_trajectory(name, VPLinear(), 12, t_end=1e-3, spacing="time-uniform", **options), gaussian.eps, START)
        for name, options in cases
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-11)


# --- Starting from an image. ---


@pytest.mark.parametrize("t_start", [0.3, 0.6])
@pytest.mark.parametrize("sampler", ["ddim", "euler-ode", "dpm-solver", "dpm-solver++", "dpm-solver++-singlestep"])
def test_image_to_image_follows_the_ode_from_where_it_starts(sampler: str, t_start: float) -> None:
    schedule = VPLinear()
    gaussian = Gaussian(schedule)
    trajectory = make_trajectory(sampler, schedule, 200, t_start=t_start, t_end=1e-3)
    alpha, sigma = trajectory.init
    assert alpha == pytest.approx(float(schedule.alpha(t_start)), rel=1e-15)
    assert alpha**2 + sigma**2 == pytest.approx(1.0, rel=1e-15)
    assert trajectory.times[0] == t_start
    start = alpha * np.full(START.shape, 0.7) + sigma * START
    exact = gaussian.flow(start, t_start, 0.0)
    np.testing.assert_allclose(run(trajectory, gaussian.eps, start), exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("sampler", ["ddpm", "euler-sde", "sde-dpm-solver++"])
def test_image_to_image_keeps_the_distribution(sampler: str) -> None:
    gaussian = Gaussian(VPLinear())
    trajectory = make_trajectory(sampler, VPLinear(), 400, t_start=0.5)
    mean, variance = propagate(trajectory, gaussian)  # from data noised by trajectory.init
    assert mean[-1] == pytest.approx(gaussian.mean, abs=0.01)
    assert variance[-1] == pytest.approx(gaussian.std**2, rel=0.05)
