import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sparse_engine
from sparse_engine.errors import OptionError
from sparse_engine.sampling import (
    SAMPLERS,
    DiscreteBetas,
    FlowMatching,
    SamplerInfo,
    Schedule,
    StableDiffusion,
    VPCosine,
    VPLinear,
    default_sampler,
    make_trajectory,
)
from sparse_engine.sampling.trajectory import model_form

SCHEDULES = [VPLinear(), VPCosine(), DiscreteBetas(), DiscreteBetas(betas="cosine"), StableDiffusion()]
IDS = ["vp-linear", "vp-cosine", "discrete", "discrete-cosine", "stable-diffusion"]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 16, 50, 1000])
def test_steps_is_the_number_of_network_evaluations(sampler: str, steps: int, schedule: Schedule) -> None:
    trajectory = make_trajectory(sampler, schedule, steps)
    assert len(trajectory) == steps
    assert trajectory.times.shape == trajectory.network_times.shape == trajectory.rebase.shape == (steps,)
    assert trajectory.coef.shape == (steps, 8)
    assert trajectory.coef.dtype == np.float64
    assert np.all(np.isfinite(trajectory.coef))
    assert np.all(np.diff(trajectory.times) < 0)
    assert trajectory.times[0] == schedule.t_max
    assert trajectory.times[-1] >= schedule.t_min * (1 - 1e-9)
    np.testing.assert_array_equal(trajectory.network_times, schedule.network_time(trajectory.times))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_first_row_reads_no_history(sampler: str) -> None:
    trajectory = make_trajectory(sampler, VPLinear(), 12)
    assert not trajectory.coef[0, 5:7].any()
    # base is what the last rebase made it; before one it must not be read.
    assert trajectory.rebase[0] or not trajectory.coef[:, 3].any()


def test_every_sampler_function_has_the_same_signature() -> None:
    signatures = {str(inspect.signature(info.function)) for info in SAMPLERS.values()}
    assert signatures == {"(schedule: 'Schedule', steps: 'int', options: 'Options') -> 'Trajectory'"}


@pytest.mark.parametrize("info", SAMPLERS.values(), ids=list(SAMPLERS))
def test_every_sampler_names_its_source(info: SamplerInfo) -> None:
    paper = re.compile(r"arXiv:\d{4}\.\d{5}, (algorithms? \d|eq\. \d|[\w+-]*DPM-Solver|the solvers)")
    assert paper.search(" ".join(str(info.function.__doc__).split()))
    assert paper.search(info.source)


def test_the_listing_is_json() -> None:
    listing = json.loads(json.dumps([info.to_dict() for info in SAMPLERS.values()]))
    assert [row["name"] for row in listing] == [
        "ddpm",
        "ddim",
        "euler-sde",
        "euler-ode",
        "dpm-solver",
        "dpm-solver++",
        "dpm-solver++-singlestep",
        "sde-dpm-solver++",
    ]
    assert {row["name"]: row["evaluations_per_step"] for row in listing}["dpm-solver"] == 3
    assert {row["name"]: row["options"] for row in listing}["ddim"] == [
        "t_start",
        "t_end",
        "spacing",
        "denoise_to_zero",
        "eta",
        "clip",
    ]


def test_the_default_sampler_is_the_authors() -> None:
    assert default_sampler(VPLinear()) == "dpm-solver"
    assert default_sampler(StableDiffusion()) == "dpm-solver++-singlestep"
    assert default_sampler(FlowMatching()) == "euler-ode"


ON_FLOW = ("euler-ode", "dpm-solver++", "sde-dpm-solver++")


@pytest.mark.parametrize("prediction", ["flow", "x0"])
@pytest.mark.parametrize("sampler", ON_FLOW)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 28, 1000])
def test_flow_matching_starts_where_alpha_is_zero(sampler: str, steps: int, prediction: str) -> None:
    trajectory = make_trajectory(sampler, FlowMatching(shift=3.0), steps, prediction=prediction)
    assert len(trajectory) == steps
    assert np.all(np.isfinite(trajectory.coef))
    assert np.all(np.diff(trajectory.times) < 0)
    assert (trajectory.times[0], trajectory.network_times[0], trajectory.init) == (1.0, 1000.0, (0.0, 1.0))


@pytest.mark.parametrize("t", [0.01, 0.5, 1.0])
def test_what_a_flow_says_of_noise_and_image(t: float) -> None:
    schedule = FlowMatching(shift=3.0)
    x0, eps = np.random.default_rng(0).standard_normal((2, 50))
    x = schedule.alpha(t) * x0 + schedule.sigma(t) * eps
    for prediction, predicted in (("flow", eps - x0), ("x0", x0)):
        for form, expected in (("eps", eps), ("x0", x0), ("flow", eps - x0)):
            of_x, of_predicted = model_form(schedule, t, prediction, form)
            np.testing.assert_allclose(of_x * x + of_predicted * predicted, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ON_FLOW])
def test_samplers_that_flow_matching_has_no_use_for_say_why(sampler: str) -> None:
    why = SAMPLERS[sampler].not_flow
    assert why is not None
    with pytest.raises(OptionError, match=f"(?s)not offered on schedule flow: {why}.*use one of {ON_FLOW[0]}"):
        make_trajectory(sampler, FlowMatching(), 10, prediction="flow")


@pytest.mark.parametrize(
    "schedule, prediction", [(FlowMatching(), "eps"), (FlowMatching(), "v"), (VPLinear(), "flow"), (VPCosine(), "flow")]
)
def test_predictions_that_a_schedule_does_not_have(schedule: Schedule, prediction: str) -> None:
    with pytest.raises(OptionError, match=f"prediction '{prediction}' on schedule {schedule.name}, expected one of"):
        make_trajectory("dpm-solver++", schedule, 10, prediction=prediction)


def test_steps_of_logsnr_need_one_that_is_finite() -> None:
    options = {"prediction": "flow", "spacing": "logsnr-uniform", "t_end": 1e-3}
    with pytest.raises(OptionError, match="t_start is 1, where the logsnr of spacing logsnr-uniform is infinite"):
        make_trajectory("dpm-solver++", FlowMatching(), 10, **options)
    assert np.all(np.isfinite(make_trajectory("dpm-solver++", FlowMatching(), 10, t_start=0.999, **options).coef))


@pytest.mark.parametrize("info", SAMPLERS.values(), ids=list(SAMPLERS))
def test_the_listing_says_which_samplers_draw(info: SamplerInfo) -> None:
    assert make_trajectory(info.name, VPLinear(), 10).stochastic is not info.deterministic


def test_ddim_with_eta_is_stochastic() -> None:
    assert make_trajectory("ddim", VPLinear(), 10, eta=0.1).stochastic


@pytest.mark.parametrize("info", SAMPLERS.values(), ids=list(SAMPLERS))
def test_only_samplers_that_form_x0_clip_it(info: SamplerInfo) -> None:
    clip = make_trajectory(info.name, VPLinear(), 10, value_range=(-1, 1)).clip
    assert clip == ((-1.0, 1.0) if info.clips else (-np.inf, np.inf))
    assert make_trajectory(info.name, VPLinear(), 10).clip == (-np.inf, np.inf)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if not name.startswith("euler")])
def test_denoise_to_zero_ends_in_the_predicted_image(sampler: str) -> None:
    """The last row returns x0 itself, whatever came before. (Euler's methods go there by Euler's update.)"""
    schedule = VPLinear()
    trajectory = make_trajectory(sampler, schedule, 10, t_end=0.01, denoise_to_zero=True)
    c, t = trajectory.coef[-1], trajectory.times[-1]
    assert t == 0.01
    on_x = c[2] + c[4] * c[0] + (c[3] if trajectory.rebase[-1] else 0.0)
    on_eps = c[4] * c[1]
    assert on_x == pytest.approx(1 / schedule.alpha(t), rel=1e-12)
    assert on_eps == pytest.approx(-schedule.sigma(t) / schedule.alpha(t), rel=1e-12)
    assert not c[5:].any()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", ["time-uniform", "time-quadratic", "logsnr-uniform"])
def test_spacings_run_from_start_to_end(sampler: str, spacing: str) -> None:
    schedule = VPLinear()
    trajectory = make_trajectory(
        sampler,
        schedule,
        9,
        order=1 if SAMPLERS[sampler].orders else None,
        spacing=spacing,
        t_start=0.8,
        t_end=0.05,
        denoise_to_zero=True,
    )
    measures: dict[str, Callable[[Any], Any]] = {
        "time-uniform": np.asarray,
        "time-quadratic": np.sqrt,
        "logsnr-uniform": schedule.lambda_,
    }
    assert trajectory.times[0] == 0.8
    assert trajectory.times[-1] == 0.05
    gaps = np.diff(measures[spacing](trajectory.times))
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_discrete_spacings_end_in_the_image(sampler: str, spacing: str) -> None:
    # Of first order: the stages of a dpm-solver step lie in between, by lambda.
    order = 1 if SAMPLERS[sampler].orders else None
    trajectory = make_trajectory(sampler, StableDiffusion(), 10, spacing=spacing, order=order)
    first, last = {"trailing": (1000, 100), "leading": (901, 1)}[spacing]
    assert trajectory.network_times[[0, -1]] == pytest.approx([first, last], rel=1e-12)
    assert not trajectory.coef[-1, 7]


@pytest.mark.parametrize("schedule, t_end", [(VPLinear(), 1e-4), (DiscreteBetas(steps=500), 1 / 500)])
def test_dpm_solver_ends_where_the_network_was_trained(schedule: Schedule, t_end: float) -> None:
    explicit = make_trajectory("dpm-solver", schedule, 20, t_end=t_end)
    np.testing.assert_array_equal(make_trajectory("dpm-solver", schedule, 20).coef, explicit.coef)


@pytest.mark.parametrize(
    "sampler, steps, options, message",
    [
        ("dpm-solver+", 10, {}, "unknown 'dpm-solver\\+', expected one of ddpm, ddim(.|\n)*did you mean 'dpm-solver"),
        ("dmdp", 10, {}, "did you mean 'ddpm'"),
        ("unipc", 10, {}, "sampler: unknown 'unipc', expected one of ddpm, ddim, euler-sde"),
        (None, 10, {}, "sampler: unknown None"),
        ("ddim", 0, {}, "steps = 0; expected a whole number"),
        ("ddim", -3, {}, "steps = -3"),
        ("ddim", 2.5, {}, "steps = 2.5"),
        ("ddim", True, {}, "steps = True"),
        ("ddim", "10", {}, "steps = '10'"),
        ("dpm-solver", 2, {"order": 3}, "steps is 2, too few for order 3 of sampler dpm-solver(.|\n)*order=2"),
        ("dpm-solver++", 1, {"order": 2}, "too few for order 2"),
        ("dpm-solver++", 10, {"order": 4}, "order = 4; expected one of 1, 2, 3 for sampler dpm-solver\\+\\+"),
        ("sde-dpm-solver++", 10, {"order": 3}, "order = 3; expected one of 1, 2 for"),
        ("dpm-solver", 10, {"order": True}, "order = True"),
        ("ddim", 10, {"order": 2}, "order: sampler ddim has none(.|\n)*dpm-solver or dpm-solver\\+\\+"),
        ("ddpm", 10, {"eta": 0.5}, "eta: sampler ddpm has none(.|\n)*leave it out, or use ddim"),
        ("ddim", 10, {"eta": 1.5}, "eta is 1.5, expected a number from 0"),
        ("ddim", 10, {"eta": "much"}, "eta = 'much'; expected a number"),
        ("ddim", 10, {"variance": "small"}, "variance: sampler ddim has none(.|\n)*use ddpm"),
        ("ddpm", 10, {"variance": "tiny"}, "variance: unknown 'tiny', expected one of small, large"),
        ("ddim", 10, {"spacing": "logsnr"}, "spacing: unknown 'logsnr'(.|\n)*did you mean 'logsnr-uniform'"),
        ("ddim", 10, {"spacing": "trailing"}, "a discrete schedule's steps; vp-linear is continuous"),
        ("ddim", 10, {"prediction": "noise"}, "prediction: unknown 'noise', expected one of eps, x0, v"),
        ("ddim", 10, {"t_end": 1.0}, "t_end is 1, expected a time in \\[0, t_start\\), and t_start is 1"),
        ("ddim", 10, {"t_start": 0.2, "t_end": 0.5}, "t_end is 0.5, expected .* t_start is 0.2"),
        ("ddim", 10, {"t_end": -0.1}, "t_end is -0.1"),
        ("ddim", 10, {"t_start": 1.1}, "t_start is 1.1, expected a time in \\(0, 1\\] of vp-linear"),
        ("ddim", 10, {"t_start": 0.0}, "t_start is 0,"),
        ("ddim", 10, {"t_start": float("nan")}, "t_start = nan; expected a finite number"),
        ("ddim", 10, {"t_end": 0.0, "spacing": "logsnr-uniform"}, "logsnr of spacing logsnr-uniform is infinite"),
        ("dpm-solver", 10, {"t_end": 0.0}, "infinite(.|\n)*denoise_to_zero=True"),
        ("ddim", 10, {"denoise_to_zero": False}, "denoise_to_zero is False and t_end is 0"),
        ("ddim", 10, {"value_range": (1.0, -1.0)}, "value_range is \\(1, -1\\), expected low < high"),
        ("ddim", 10, {"value_range": (1.0,)}, "value_range is \\(1.0,\\), expected \\(low, high\\)"),
        ("ddim", 10, {"value_range": 1.0}, "value_range is 1.0, expected \\(low, high\\)"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    sampler: Any, steps: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        make_trajectory(sampler, VPLinear(), steps, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 1001, "spacing": "trailing"}, "1001 steps of spacing trailing do not fit"),
        ({"steps": 1001, "spacing": "leading"}, "1001 steps of spacing leading do not fit"),
        ({"steps": 10, "spacing": "trailing", "t_end": 0.1}, "spacing trailing always ends at 0"),
    ],
)
def test_discrete_spacings_refuse_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_trajectory("ddim", StableDiffusion(), **options)


def test_a_schedule_without_any_signal_left_is_refused() -> None:
    schedule = VPLinear(beta_min=0.1, beta_max=4000.0)  # alpha(1) is exp(-1000)
    with pytest.raises(OptionError, match="step 0 at t = 1 has a coefficient that is not finite"):
        make_trajectory("ddim", schedule, 10)


def test_importing_the_samplers_needs_numpy_only() -> None:
    code = (
        f"import sys, types; p = types.ModuleType('sparse_engine'); p.__path__ = {list(sparse_engine.__path__)};"
        "sys.modules['sparse_engine'] = p; import sparse_engine.sampling;"
        "print(sorted({'torch', 'scipy', 'onnx', 'onnxruntime', 'diffusers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
