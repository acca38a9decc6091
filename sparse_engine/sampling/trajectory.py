"""A trajectory: what one sampling run does, as a table with one row for each network call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sparse_engine.errors import OptionError
from sparse_engine.sampling.schedules import Float64, Schedule

PREDICTIONS = ("eps", "x0", "v", "flow")
Form = Literal["eps", "x0", "flow"]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The S network calls of a sampling run.

    A call with the row ``coef`` computes, in the step graph::

        eps    = net(x, network_time)                        # whatever the network predicts
        m      = clip(coef[0]*x + coef[1]*eps, *clip)
        x_next = coef[2]*x + coef[3]*base + coef[4]*m + coef[5]*h1 + coef[6]*h2 + coef[7]*z

    and then h2 <- h1, h1 <- m. Where ``rebase`` is set, base <- x before the call.

    Attributes:
        sampler: the sampler's name.
        times: schedule time of each call, descending, [S].
        network_times: what the network is given, [S].
        coef: the rows, [S, 8].
        rebase: [S], bool.
        clip: (low, high) of m; (-inf, inf) when off.
        init: (alpha, sigma) at ``times[0]``. Sampling from an image starts from
            ``alpha * image + sigma * noise``; sampling from nothing starts from the noise itself.
        stochastic: whether any row draws noise.
    """

    sampler: str
    times: Float64
    network_times: Float64
    coef: Float64
    rebase: npt.NDArray[np.bool_]
    clip: tuple[float, float]
    init: tuple[float, float]
    stochastic: bool

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a sampler may be asked, every default filled in; ``make_trajectory`` explains each.

    ``denoise_to_zero`` is set whenever the last time is 0, so also where ``t_end`` is.
    """

    t_start: float
    t_end: float
    spacing: str
    denoise_to_zero: bool
    eta: float
    variance: str
    order: int
    prediction: str
    value_range: tuple[float, float] | None


def model_form(schedule: Schedule, t: npt.ArrayLike, prediction: str, form: Form) -> tuple[Float64, Float64]:
    """Coefficients (of x, of the network's output) that give ``form`` from what the network predicts.

    x = alpha x0 + sigma eps and v = alpha eps - sigma x0 (Salimans and Ho 2022, arXiv:2202.00512,
    appendix D), solved for eps or for x0. In flow matching, where alpha + sigma is 1, "flow" is eps - x0
    (Esser et al. 2024, arXiv:2403.03206, eq. 13): x0 = x - sigma flow, eps = x + alpha flow.

    Raises:
        OptionError: no network of this schedule predicts that.
    """
    check_prediction(schedule, prediction)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if prediction == form:
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "flow":
        return np.ones_like(alpha), alpha if form == "eps" else -sigma
    if form == "flow":
        return 1.0 / sigma, -1.0 / sigma  # of x0, the other that these schedules have
    if prediction == "v":
        return (sigma, alpha) if form == "eps" else (alpha, -sigma)
    if form == "eps":
        return 1.0 / sigma, -alpha / sigma
    return 1.0 / alpha, -sigma / alpha


def check_prediction(schedule: Schedule, prediction: str) -> None:
    """Refuse a prediction that no network of this schedule makes. Raises OptionError."""
    if prediction not in schedule.predictions:
        raise OptionError(
            f"prediction {prediction!r} on schedule {schedule.name}, expected one of {', '.join(schedule.predictions)}",
            "flow goes with flow alone: the step from noise to image is another elsewhere",
        )


def assemble(
    sampler: str,
    schedule: Schedule,
    options: Options,
    form: Form,
    times: npt.ArrayLike,
    *,
    x: npt.ArrayLike = 0.0,
    base: npt.ArrayLike = 0.0,
    m: npt.ArrayLike = 0.0,
    h1: npt.ArrayLike = 0.0,
    h2: npt.ArrayLike = 0.0,
    z: npt.ArrayLike = 0.0,
    rebase: npt.ArrayLike = False,
) -> Trajectory:
    """Put a sampler's columns together; each is [S] or a number.

    Raises:
        OptionError: the table has a value that is not finite: the schedule cannot be sampled this way.
    """
    times = np.asarray(times, np.float64)
    with np.errstate(divide="ignore"):  # an alpha of 0 is refused below
        model = model_form(schedule, times, options.prediction, form)
    columns = (*model, x, base, m, h1, h2, z)
    coef = np.stack([np.broadcast_to(np.asarray(c, np.float64), times.shape) for c in columns], axis=1)
    with np.errstate(over="ignore", invalid="ignore"):  # the step graph has them in float32
        finite = np.isfinite(coef.astype(np.float32)).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise OptionError(
            f"sampler {sampler} on schedule {schedule.name}: step {row} at t = {times[row]:.6g} has a "
            "coefficient that is not finite in float32",
            "start from a smaller t_start, or end at a larger t_end",
        )
    clip = options.value_range if form == "x0" and options.value_range else (-np.inf, np.inf)
    return Trajectory(
        sampler=sampler,
        times=times,
        network_times=schedule.network_time(times),
        coef=coef,
        rebase=np.array(np.broadcast_to(rebase, times.shape), bool),
        clip=clip,
        init=(float(schedule.alpha(times[0])), float(schedule.sigma(times[0]))),
        stochastic=bool(np.any(coef[:, 7] != 0)),
    )
