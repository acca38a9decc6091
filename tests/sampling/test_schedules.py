import json
import math
from typing import Any

import numpy as np
import pytest

from sparse_engine.errors import OptionError
from sparse_engine.sampling import (
    DiscreteBetas,
    FlowMatching,
    Schedule,
    StableDiffusion,
    VPCosine,
    VPLinear,
    schedule_from_dict,
)

SCHEDULES = [
    VPLinear(),
    VPLinear(beta_min=0.5, beta_max=12.0, time_scale=1000.0, time_shift=-1.0),
    VPCosine(),
    DiscreteBetas(),
    DiscreteBetas(betas="cosine", steps=400),
    StableDiffusion(),
]
FLOWS = [FlowMatching(), FlowMatching(shift=3.0), FlowMatching(shift=0.5, time_scale=1.0)]
IDS = [f"{schedule.name}-{i}" for i, schedule in enumerate(SCHEDULES)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
def test_alpha_and_sigma_are_variance_preserving_and_run_from_image_to_noise(schedule: Schedule) -> None:
    t = np.linspace(0.0, schedule.t_max, 1001)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, rtol=1e-13)
    assert schedule.alpha(0.0) == 1.0
    assert schedule.sigma(0.0) == 0.0
    assert schedule.lambda_(0.0) == np.inf
    assert np.all(np.diff(schedule.lambda_(t[1:])) < 0)
    assert schedule.sigma(schedule.t_max) > 0.99


@pytest.mark.parametrize("schedule", FLOWS)
def test_flow_matching_is_a_straight_path_from_image_to_noise(schedule: FlowMatching) -> None:
    t = np.linspace(0.0, 1.0, 1001)
    s = schedule.shift * t / (1 + (schedule.shift - 1) * t)
    np.testing.assert_allclose(schedule.sigma(t), s, rtol=1e-13)
    np.testing.assert_allclose(schedule.alpha(t), 1 - s, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(schedule.network_time(t), schedule.time_scale * s, rtol=1e-13)
    assert (schedule.alpha(0.0), schedule.sigma(0.0), schedule.alpha(1.0), schedule.sigma(1.0)) == (1, 0, 0, 1)
    assert (schedule.lambda_(0.0), schedule.lambda_(1.0)) == (np.inf, -np.inf)
    np.testing.assert_allclose(schedule.inverse_log_alpha(schedule.log_alpha(t[:-1])), t[:-1], rtol=1e-9, atol=1e-12)
    inside = np.linspace(0.01, 0.99, 99)
    slope = (schedule.log_alpha(inside + 1e-7) - schedule.log_alpha(inside - 1e-7)) / 2e-7
    np.testing.assert_allclose(schedule.beta(inside), -2.0 * slope, rtol=1e-5)


@pytest.mark.parametrize("schedule", [*SCHEDULES, *FLOWS])
def test_inverse_lambda_returns_the_time(schedule: Schedule) -> None:
    t = np.linspace(1e-4, schedule.t_max, 997)
    np.testing.assert_allclose(schedule.inverse_lambda(schedule.lambda_(t)), t, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
def test_beta_is_the_slope_of_log_alpha(schedule: Schedule) -> None:
    # At a distance from a discrete schedule's knots, between which beta is constant.
    t = (np.arange(20, 380, 17) + 0.5) / 400.0 + 1e-5
    h = 1e-7
    slope = (schedule.log_alpha(t + h) - schedule.log_alpha(t - h)) / (2 * h)
    np.testing.assert_allclose(schedule.beta(t), -2.0 * slope, rtol=1e-6)


@pytest.mark.parametrize("steps", [10, 1000])
def test_beta_at_step_n_of_a_chain_is_that_of_the_step_that_led_there(steps: int) -> None:
    schedule = DiscreteBetas(steps=steps)
    n = np.arange(1, steps + 1)
    expected = -steps * np.log1p(-np.linspace(1e-4, 0.02, steps))
    np.testing.assert_allclose(schedule.beta(n / steps), expected, rtol=1e-9)


def test_sigma_keeps_its_digits_close_to_the_image() -> None:
    t = 1e-9
    assert VPLinear().sigma(t) == pytest.approx(math.sqrt(0.1 * t), rel=1e-9)


@pytest.mark.parametrize(
    "schedule, t, expected",
    [
        # exp(-(0.1 t + 9.95 t^2) / 2), by hand.
        (VPLinear(), 1.0, math.exp(-5.025)),
        (VPLinear(), 0.5, math.exp(-1.26875)),
        (VPCosine(), 0.5, math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)),
        # One step of the chain, and the value of Stable Diffusion's last alpha_bar, 0.0047.
        (DiscreteBetas(), 0.001, math.sqrt(1 - 1e-4)),
        (StableDiffusion(), 0.001, math.sqrt(1 - 0.00085)),
        (StableDiffusion(), 1.0, math.sqrt(0.004660)),
    ],
)
def test_alpha_at_known_points(schedule: Schedule, t: float, expected: float) -> None:
    assert schedule.alpha(t) == pytest.approx(expected, rel=2e-4 if t == 1.0 else 1e-12)


@pytest.mark.parametrize("kind, name", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_discrete_schedules_are_those_of_diffusers(kind: str, name: str) -> None:
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler(beta_schedule=name)
    expected = scheduler.alphas_cumprod.double().numpy()
    n = np.arange(1, 1001)
    # diffusers multiplies a thousand float32 numbers.
    np.testing.assert_allclose(DiscreteBetas(betas=kind).alpha(n / 1000) ** 2, expected, rtol=1e-4)


def test_stable_diffusion_is_that_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    expected = scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(StableDiffusion().alpha(np.arange(1, 1001) / 1000) ** 2, expected, rtol=1e-4)


def test_the_network_gets_its_own_time() -> None:
    assert VPLinear().network_time(0.5) == 499.5
    assert StableDiffusion().network_time(0.001) == 1.0
    assert DiscreteBetas(time_shift=-1.0).network_time(1.0) == 999.0


def test_the_cosine_schedule_starts_before_alpha_is_zero() -> None:
    assert VPCosine().t_max == 0.9946
    assert np.isfinite(VPCosine().lambda_(VPCosine().t_max))


@pytest.mark.parametrize("schedule", [*SCHEDULES, *FLOWS])
def test_a_schedule_survives_json(schedule: Schedule) -> None:
    assert schedule_from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_whole_numbers_are_taken_for_floats() -> None:
    assert schedule_from_dict({"name": "vp-linear", "beta_max": 20, "time_scale": 999}) == VPLinear()


@pytest.mark.parametrize(
    "data, message",
    [
        ({"name": "vp-lineer"}, "name is one of vp-linear, vp-cosine, discrete"),
        ({}, "expected a mapping whose name"),
        ("vp-linear", "expected a mapping"),
        ({"name": ["vp-linear"]}, "expected a mapping whose name"),
        ({"name": "vp-linear", "beta": 1.0}, "unknown key 'beta', expected some of time_scale"),
        ({"name": "vp-linear", "beta_max": "20"}, "beta_max is '20', expected a value of type float"),
        ({"name": "vp-linear", "beta_max": True}, "beta_max is True, expected a value of type float"),
        ({"name": "vp-linear", "beta_min": 30.0}, "expected 0 < beta_min < beta_max"),
        ({"name": "vp-linear", "time_scale": 0.0}, "time_scale is 0.0, expected more than 0"),
        ({"name": "vp-linear", "time_shift": math.nan}, "time_shift = nan; expected a finite number"),
        ({"name": "vp-cosine", "t_final": 1.0}, "alpha is 0 at 1"),
        ({"name": "vp-cosine", "offset": -0.1}, "offset is -0.1"),
        ({"name": "discrete", "betas": "quadratic"}, "expected one of linear, scaled-linear, cosine"),
        ({"name": "discrete", "steps": 1}, "steps = 1; expected a whole number of 2 or more"),
        ({"name": "discrete", "steps": 10.5}, "steps is 10.5, expected a value of type int"),
        ({"name": "flow", "shift": 0.0}, r"shift is 0.0, expected a number in \(0, 1000\]"),
        ({"name": "flow", "shift": 1e9}, "shift is 1000000000.0"),
        ({"name": "discrete", "beta_end": 1.5}, "expected 0 < beta_start < beta_end < 1"),
    ],
)
def test_nonsense_is_refused(data: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        schedule_from_dict(data)
