"""The times that a sampler visits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sparse_engine.errors import OptionError
from sparse_engine.sampling.schedules import DiscreteBetas, Float64, Schedule
from sparse_engine.sampling.trajectory import Options


def _time_uniform(schedule: Schedule, t_start: float, t_end: float, intervals: int) -> Float64:
    """Equal steps of t."""
    return np.linspace(t_start, t_end, intervals + 1)


def _time_quadratic(schedule: Schedule, t_start: float, t_end: float, intervals: int) -> Float64:
    """Equal steps of sqrt(t) (Song et al. 2021, arXiv:2010.02502, appendix D.2)."""
    return np.linspace(np.sqrt(t_start), np.sqrt(t_end), intervals + 1) ** 2


def _logsnr_uniform(schedule: Schedule, t_start: float, t_end: float, intervals: int) -> Float64:
    """Equal steps of lambda (Lu et al. 2022, arXiv:2206.00927, section 3.3)."""
    ends = schedule.lambda_([t_start, t_end])
    if not np.isfinite(ends).all():
        raise OptionError(
            f"t_start is {t_start:g}, where the logsnr of spacing logsnr-uniform is infinite on {schedule.name}",
            "start below it, or use time-uniform",
        )
    return schedule.inverse_lambda(np.linspace(ends[0], ends[1], intervals + 1))


def _trailing(schedule: Schedule, t_start: float, t_end: float, intervals: int) -> Float64:
    """Whole steps of a discrete schedule, the last one always among them.

    Lin et al. 2024, arXiv:2305.08891, table 2.
    """
    N = _discrete_steps(schedule)
    return np.round(t_start * N * np.linspace(1.0, 0.0, intervals + 1)) / N


def _leading(schedule: Schedule, t_start: float, t_end: float, intervals: int) -> Float64:
    """Whole steps of a discrete schedule, the first one always among them.

    Lin et al. 2024, arXiv:2305.08891, table 2: DDPM's and DDIM's original choice.
    """
    N = _discrete_steps(schedule)
    stride = int(np.round(t_start * N)) // intervals
    return np.append((1 + stride * np.arange(intervals))[::-1], 0) / N


def _discrete_steps(schedule: Schedule) -> int:
    if not isinstance(schedule, DiscreteBetas):
        raise OptionError(
            f"spacing: trailing and leading count a discrete schedule's steps; {schedule.name} is continuous",
            "use time-uniform",
        )
    return schedule.steps


SPACINGS: dict[str, Callable[[Schedule, float, float, int], Float64]] = {
    "time-uniform": _time_uniform,
    "time-quadratic": _time_quadratic,
    "logsnr-uniform": _logsnr_uniform,
    "trailing": _trailing,
    "leading": _leading,
}
ENDING_AT_ZERO = ("trailing", "leading")


def grid(schedule: Schedule, options: Options, intervals: int) -> Float64:
    """The times of ``intervals`` solver steps, [intervals + 1], strictly descending.

    They run from ``t_start`` to ``t_end``; with ``denoise_to_zero`` the last interval goes on from there to 0.

    Raises:
        OptionError: the spacing does not fit the schedule, or has no room for so many steps.
    """
    extra = options.denoise_to_zero and options.t_end > 0
    if extra and intervals == 1:
        return np.array([options.t_start, 0.0])
    times = _spread(schedule, options, intervals - extra)
    return np.append(times, 0.0) if extra else times


def _spread(schedule: Schedule, options: Options, intervals: int) -> Float64:
    times = SPACINGS[options.spacing](schedule, options.t_start, options.t_end, intervals)
    if options.spacing not in ENDING_AT_ZERO:
        times[0], times[-1] = options.t_start, options.t_end  # exactly, not to rounding
    if np.any(np.diff(times) >= 0):
        raise OptionError(
            f"steps: {intervals} steps of spacing {options.spacing} do not fit between t = "
            f"{options.t_start:g} and {options.t_end:g} of schedule {schedule.name}",
            "take fewer steps",
        )
    return times
