"""Every sampler that diffusers has, at the same times, with the same model and the same noise.

diffusers' tables are put in at float64, so that what is compared is the solvers' arithmetic.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from oracles import bent, relative_error, run

from sparse_engine.sampling import (
    DiscreteBetas,
    FlowMatching,
    Schedule,
    StableDiffusion,
    Trajectory,
    VPLinear,
    make_trajectory,
)

# Of diffusers itself, which is not asked for float64 nor for its first DPM-Solver any more.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*algorithm_types=dpmsolver:FutureWarning"),
]

TOLERANCE = 1e-5
SHAPE = (2, 3, 4, 4)
DISCRETE = DiscreteBetas(time_shift=-1.0)
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def _start() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE)


def _noise(draw: int) -> np.ndarray:
    return np.random.default_rng([1, draw]).standard_normal(SHAPE)


def _own(trajectory: Trajectory, schedule: Schedule) -> np.ndarray:
    return run(trajectory, lambda x, t: bent(x, float(schedule.network_time(t))), _start(), _noise)


def _chain(cls: type, steps: int, **config: Any) -> Any:
    """diffusers' DDPM or DDIM with its products of alphas in float64."""
    scheduler = cls(timestep_spacing="trailing", **config)
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("steps", [10, 1000])
def test_ddpm(steps: int, variance: str, clip: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = _chain(DDPMScheduler, steps, variance_type=f"fixed_{variance}", clip_sample=clip is not None)
    x = torch.from_numpy(_start())
    for i, n in enumerate(scheduler.timesteps):
        # diffusers draws in the step to the image too, unless that is a step from n = 0.
        noise = torch.from_numpy(_noise(i + 1)) * (i + 1 < steps)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=noise, **__: z)
        x = scheduler.step(bent(x, float(n)), n, x).prev_sample
    trajectory = make_trajectory("ddpm", DISCRETE, steps, variance=variance, value_range=clip)
    assert relative_error(_own(trajectory, DISCRETE), x.numpy()) < TOLERANCE


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_ddim(steps: int, eta: float, clip: tuple[float, float] | None, prediction: str) -> None:
    scheduler = _chain(DDIMScheduler, steps, clip_sample=clip is not None, prediction_type=PREDICTIONS[prediction])
    x = torch.from_numpy(_start())
    for i, n in enumerate(scheduler.timesteps):
        noise = torch.from_numpy(_noise(i + 1))
        x = scheduler.step(
            bent(x, float(n)), int(n), x, eta=eta, use_clipped_model_output=True, variance_noise=noise
        ).prev_sample
    trajectory = make_trajectory(
        "ddim", DISCRETE, steps, eta=eta, value_range=clip, prediction=prediction, spacing="trailing"
    )
    assert relative_error(_own(trajectory, DISCRETE), x.numpy()) < TOLERANCE


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [7, 30, 1000])
def test_discrete_spacings_visit_the_same_steps(steps: int, spacing: str) -> None:
    scheduler: Any = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    found = make_trajectory("ddim", DISCRETE, steps, spacing=spacing).network_times
    np.testing.assert_allclose(found, scheduler.timesteps.numpy(), atol=1e-9)


def _dpm(cls: type, trajectory: Trajectory, schedule: Schedule, end: float, **config: Any) -> Any:
    """diffusers' DPM-Solver at a trajectory's own times, ending at ``end``; diffusers' sigma is sigma / alpha."""
    final = "zero" if end == 0 else "sigma_min"
    scheduler = cls(final_sigmas_type=final, **config)
    scheduler.set_timesteps(len(trajectory))
    times = np.append(trajectory.times, end)
    scheduler.sigmas = torch.from_numpy(schedule.sigma(times) / schedule.alpha(times))
    scheduler.timesteps = torch.from_numpy(trajectory.network_times)
    scheduler._step_index = 0
    return scheduler


def _dpm_sample(
    scheduler: Any,
    start: np.ndarray,
    noise: Callable[[int], np.ndarray] | None = None,
    stage: Callable[[Any, int], None] | None = None,
) -> np.ndarray:
    x = torch.from_numpy(start)
    for i, n in enumerate(scheduler.timesteps):
        options = {} if noise is None else {"variance_noise": torch.from_numpy(noise(i + 1))}
        if stage is not None:
            stage(scheduler, i)
        x = scheduler.step(bent(x, float(n)), n, x, **options).prev_sample
    return np.asarray(x)


SCHEDULES = [VPLinear(), StableDiffusion()]
SCHEDULE_IDS = ["vp-linear", "stable-diffusion"]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t_end", [0.0, 1e-3])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [5, 14, 15, 40])
def test_multistep(steps: int, order: int, t_end: float, prediction: str, schedule: Schedule) -> None:
    trajectory = make_trajectory("dpm-solver++", schedule, steps, order=order, t_end=t_end, prediction=prediction)
    scheduler = _dpm(
        DPMSolverMultistepScheduler,
        trajectory,
        schedule,
        t_end,
        algorithm_type="dpmsolver++",
        solver_order=order,
        solver_type="midpoint",
        prediction_type=PREDICTIONS[prediction],
    )
    assert relative_error(_own(trajectory, schedule), _dpm_sample(scheduler, _start())) < TOLERANCE


@pytest.mark.parametrize("schedule", SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.parametrize("t_end", [0.0, 1e-3])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [5, 40])
def test_sde_multistep(steps: int, order: int, t_end: float, schedule: Schedule) -> None:
    trajectory = make_trajectory(
        "sde-dpm-solver++", schedule, steps, order=order, t_end=t_end, denoise_to_zero=t_end == 0
    )
    scheduler = _dpm(
        DPMSolverMultistepScheduler,
        trajectory,
        schedule,
        t_end,
        algorithm_type="sde-dpmsolver++",
        solver_order=order,
        solver_type="midpoint",
    )
    assert relative_error(_own(trajectory, schedule), _dpm_sample(scheduler, _start(), _noise)) < TOLERANCE


def _authors_stages(scheduler: Any, i: int) -> None:
    """DPM-Solver-3 as published: the derivative over phi_2 in stage two, only the last model output in three.

    diffusers calls the first of these ``heun`` and the second ``midpoint``.
    """
    inner = scheduler.order_list[i] == 2 and scheduler.order_list[i + 1 : i + 2] == [3]
    scheduler.register_to_config(solver_type="heun" if inner else "midpoint")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [5, 6, 7, 40])
@pytest.mark.parametrize(
    "sampler, algorithm, to_zero",
    [
        ("dpm-solver", "dpmsolver", False),  # diffusers' form of it divides by zero at t = 0
        ("dpm-solver++-singlestep", "dpmsolver++", False),
        ("dpm-solver++-singlestep", "dpmsolver++", True),
    ],
)
def test_singlestep(sampler: str, algorithm: str, steps: int, order: int, to_zero: bool, schedule: Schedule) -> None:
    trajectory = make_trajectory(sampler, schedule, steps, order=order, t_end=1e-3, denoise_to_zero=to_zero)
    scheduler = _dpm(
        DPMSolverSinglestepScheduler,
        trajectory,
        schedule,
        0.0 if to_zero else 1e-3,
        algorithm_type=algorithm,
        solver_order=order,
        lower_order_final=True,
    )
    # diffusers ends an even number of second-order stages with two first-order ones; here the stages are cut
    # where the trajectory cuts them.
    starts = np.flatnonzero(np.append(trajectory.rebase, True))
    scheduler.order_list = [k + 1 for length in np.diff(starts) for k in range(length)]
    assert max(scheduler.order_list) == order
    expected = _dpm_sample(scheduler, _start(), stage=_authors_stages)
    assert relative_error(_own(trajectory, schedule), expected) < TOLERANCE


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 28, 50])
def test_euler_of_flow_matching_at_diffusers_own_times(steps: int, shift: float) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    schedule = FlowMatching(shift=shift)
    trajectory = make_trajectory("euler-ode", schedule, steps, prediction="flow")
    np.testing.assert_allclose(trajectory.network_times, scheduler.timesteps.numpy(), rtol=2e-6)
    # Sigmas at float64, which diffusers rounds.
    scheduler.sigmas = torch.from_numpy(schedule.sigma(np.append(trajectory.times, 0.0)))
    scheduler.timesteps = torch.from_numpy(trajectory.network_times)
    x = torch.from_numpy(_start())
    for n in scheduler.timesteps:
        x = scheduler.step(bent(x, float(n)), n, x).prev_sample
    assert relative_error(_own(trajectory, schedule), x.numpy()) < TOLERANCE


@pytest.mark.parametrize(
    "algorithm, order",
    [("dpmsolver++", 1), ("dpmsolver++", 2), ("dpmsolver++", 3), ("sde-dpmsolver++", 1), ("sde-dpmsolver++", 2)],
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [5, 14, 15, 40])
def test_multistep_of_flow_matching(steps: int, shift: float, order: int, algorithm: str) -> None:
    scheduler: Any = DPMSolverMultistepScheduler(
        algorithm_type=algorithm,
        solver_order=order,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )
    scheduler.set_timesteps(steps)
    schedule = FlowMatching(shift=shift)
    sampler = algorithm.replace("dpmsolver", "dpm-solver")
    trajectory = make_trajectory(sampler, schedule, steps, order=order, prediction="flow", t_start=0.999, t_end=0.0)
    np.testing.assert_allclose(trajectory.network_times, scheduler.timesteps.numpy(), atol=1.0)  # cut to whole
    scheduler.sigmas = torch.from_numpy(schedule.sigma(np.append(trajectory.times, 0.0)))
    scheduler.timesteps = torch.from_numpy(trajectory.network_times)
    scheduler._step_index = 0
    expected = _dpm_sample(scheduler, _start(), _noise)
    assert relative_error(_own(trajectory, schedule), expected) < TOLERANCE
