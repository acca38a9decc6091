"""``make_trajectory``: a request checked, its defaults filled in, and handed to its sampler."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from sparse_engine import arguments
from sparse_engine.errors import OptionError
from sparse_engine.sampling.grid import ENDING_AT_ZERO, SPACINGS
from sparse_engine.sampling.schedules import FlowMatching, Schedule
from sparse_engine.sampling.solvers.registry import SAMPLERS, SamplerInfo
from sparse_engine.sampling.trajectory import PREDICTIONS, Options, Trajectory, check_prediction

MOST_STEPS = 1_000_000

VARIANCES = ("small", "large")
CONTINUOUS_T_END = 1e-3


def make_trajectory(
    sampler: str,
    schedule: Schedule,
    steps: int,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    spacing: str | None = None,
    eta: float | None = None,
    variance: str | None = None,
    order: int | None = None,
    prediction: str = "eps",
    value_range: tuple[float, float] | None = None,
    denoise_to_zero: bool | None = None,
) -> Trajectory:
    """The table of coefficients that samples ``schedule`` with ``steps`` network evaluations.

    None is the sampler's default, which ``SAMPLERS`` holds; ``options`` there names what each accepts.

    Args:
        sampler: a name out of ``SAMPLERS``.
        schedule: what the network was trained on.
        steps: network evaluations, all told: the length of the trajectory.
        t_start: schedule time to start from, ``schedule.t_max`` by default. Less of it changes an image
            instead of drawing one: start from ``Trajectory.init``.
        t_end: schedule time of the state that is returned, before ``denoise_to_zero``.
        spacing: how the times are spread: ``time-uniform``, ``time-quadratic``, ``logsnr-uniform``; on
            discrete schedules also ``trailing`` and ``leading``, which take whole steps and end at 0.
        eta: DDIM's noise, 0 (none) to 1 (DDPM's).
        variance: DDPM's: ``small`` or ``large``.
        order: of the DPM-Solvers; by default theirs, or ``steps`` where that is less.
        prediction: what the network predicts: ``eps``, ``x0`` or ``v``; on schedule ``flow``: ``flow`` or ``x0``.
        value_range: (low, high) to clip the predicted x0 to; None does not clip. Samplers that never form
            x0 (the Euler methods and ``dpm-solver``) have nothing to clip and ignore it.
        denoise_to_zero: the last of the steps goes from ``t_end`` to t = 0, by the sampler's own first-order
            update without noise.

    Raises:
        OptionError: an unknown name, an option that the sampler does not have, or a value that it cannot use.
    """
    info = SAMPLERS[_known("sampler", sampler, tuple(SAMPLERS))]
    steps = arguments.whole_number("steps", steps, 1, MOST_STEPS)
    prediction = _known("prediction", prediction, PREDICTIONS)
    check_prediction(schedule, prediction)
    _check_flow(info, schedule)
    spacing = _spacing(info, spacing)
    start, end, to_zero = _times(info, schedule, spacing, t_start, t_end, denoise_to_zero)
    options = Options(
        t_start=start,
        t_end=end,
        spacing=spacing,
        denoise_to_zero=to_zero,
        eta=_eta(info, eta),
        variance=_variance(info, variance),
        order=_order(info, order, steps),
        prediction=prediction,
        value_range=_value_range(value_range),
    )
    return info.function(schedule, steps, options)


def _known(what: str, found: object, names: Sequence[str]) -> str:
    if isinstance(found, str) and found in names:
        return found
    close = difflib.get_close_matches(str(found), names, n=1, cutoff=0.5)
    raise OptionError(
        f"{what}: unknown {found!r}, expected one of {', '.join(names)}",
        f"did you mean {close[0]!r}?" if close else None,
    )


def _check_flow(info: SamplerInfo, schedule: Schedule) -> None:
    if info.not_flow is not None and isinstance(schedule, FlowMatching):
        offered = ", ".join(name for name, other in SAMPLERS.items() if other.not_flow is None)
        raise OptionError(
            f"sampler {info.name} is not offered on schedule {schedule.name}: {info.not_flow}", f"use one of {offered}"
        )


def _has_no(info: SamplerInfo, option: str, owners: Sequence[str]) -> OptionError:
    return OptionError(
        f"{option}: sampler {info.name} has none, expected None", f"leave it out, or use {' or '.join(owners)}"
    )


def _spacing(info: SamplerInfo, spacing: str | None) -> str:
    return info.spacing if spacing is None else _known("spacing", spacing, tuple(SPACINGS))


def _times(
    info: SamplerInfo,
    schedule: Schedule,
    spacing: str,
    t_start: float | None,
    t_end: float | None,
    denoise_to_zero: bool | None,
) -> tuple[float, float, bool]:
    start = schedule.t_max if t_start is None else arguments.real_number("t_start", t_start)
    if not 0 < start <= schedule.t_max:
        raise OptionError(f"t_start is {start:g}, expected a time in (0, {schedule.t_max:g}] of {schedule.name}")
    if t_end is None:
        whole = isinstance(schedule, FlowMatching) and not info.denoise_to_zero  # equal steps all the way
        ends_at_zero = info.t_end == 0 or spacing in ENDING_AT_ZERO or whole
        end = 0.0 if ends_at_zero and spacing != "logsnr-uniform" else schedule.t_min or info.t_end or CONTINUOUS_T_END
        to_zero = ends_at_zero or info.denoise_to_zero
    else:
        end = arguments.real_number("t_end", t_end)
        to_zero = end == 0 or info.denoise_to_zero
    if not 0 <= end < start:
        raise OptionError(f"t_end is {end:g}, expected a time in [0, t_start), and t_start is {start:g}")
    if spacing in ENDING_AT_ZERO and end > 0:
        raise OptionError(
            f"t_end is {end:g}, and spacing {spacing} always ends at 0", "leave t_end out, or use time-uniform"
        )
    if spacing == "logsnr-uniform" and end == 0:
        raise OptionError(
            "t_end is 0, where the logsnr of spacing logsnr-uniform is infinite, expected more than 0",
            f"use t_end={schedule.t_min or CONTINUOUS_T_END:g} with denoise_to_zero=True",
        )
    if denoise_to_zero is not None:
        to_zero = arguments.truth("denoise_to_zero", denoise_to_zero)
    if end == 0 and not to_zero:
        raise OptionError("denoise_to_zero is False and t_end is 0", "give a t_end above 0, or leave it out")
    return start, end, to_zero


def _eta(info: SamplerInfo, eta: float | None) -> float:
    if eta is None:
        return 0.0
    if not info.has_eta:
        raise _has_no(info, "eta", [s.name for s in SAMPLERS.values() if s.has_eta])
    value = arguments.real_number("eta", eta)
    if not 0 <= value <= 1:
        raise OptionError(f"eta is {value:g}, expected a number from 0 (deterministic) to 1 (DDPM)")
    return value


def _variance(info: SamplerInfo, variance: str | None) -> str:
    if variance is None:
        return VARIANCES[0]
    if not info.has_variance:
        raise _has_no(info, "variance", [s.name for s in SAMPLERS.values() if s.has_variance])
    return _known("variance", variance, VARIANCES)


def _order(info: SamplerInfo, order: int | None, steps: int) -> int:
    if order is None:
        return info.orders[0] if info.orders else 1
    if not info.orders:
        raise _has_no(info, "order", [s.name for s in SAMPLERS.values() if s.orders])
    offered = f"one of {', '.join(str(k) for k in sorted(info.orders))} for sampler {info.name}"
    order = arguments.whole_number("order", order, expected=offered)
    if order not in info.orders:
        raise arguments.refused("order", order, offered)
    if steps < order:
        raise OptionError(
            f"steps is {steps}, too few for order {order} of sampler {info.name}, expected {order} or more",
            f"take {order} steps or more, or order={steps}",
        )
    return order


def _value_range(value_range: tuple[float, float] | None) -> tuple[float, float] | None:
    if value_range is None:
        return None
    try:
        low, high = (arguments.real_number("value_range", v) for v in value_range)
    except (TypeError, ValueError) as error:
        raise OptionError(f"value_range is {value_range!r}, expected (low, high)") from error
    if not low < high:
        raise OptionError(f"value_range is ({low:g}, {high:g}), expected low < high")
    return low, high
