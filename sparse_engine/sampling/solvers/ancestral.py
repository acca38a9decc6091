"""DDPM and DDIM: steps of the discrete reverse chain, from any time to any earlier one."""

from __future__ import annotations

import numpy as np

from sparse_engine.sampling.grid import grid
from sparse_engine.sampling.schedules import Float64, Schedule
from sparse_engine.sampling.trajectory import Options, Trajectory, assemble


def _skip_variance(schedule: Schedule, t: Float64, s: Float64) -> Float64:
    """beta_{t|s}: the variance of x_t given x_s, s < t, without cancellation for neighbouring times."""
    return -np.expm1(2.0 * (schedule.log_alpha(t) - schedule.log_alpha(s)))


def ddpm(schedule: Schedule, steps: int, options: Options) -> Trajectory:
    """Ancestral sampling (DDPM, Ho et al. 2020, arXiv:2006.11239, algorithm 2 with eq. 7).

    Draws x_s from the posterior q(x_s | x_t, x0) with the predicted, clipped x0. Its variance is the
    posterior's (``small``) or that of q(x_t | x_s) (``large``; section 3.2). Nothing is drawn at s = 0.
    """
    times = grid(schedule, options, steps)
    t, s = times[:-1], times[1:]
    skip = _skip_variance(schedule, t, s)
    variance_t, variance_s = schedule.sigma(t) ** 2, schedule.sigma(s) ** 2
    small = skip * variance_s / variance_t
    variance = small if options.variance == "small" else np.where(s > 0, skip, 0.0)
    return assemble(
        "ddpm",
        schedule,
        options,
        "x0",
        t,
        x=np.exp(schedule.log_alpha(t) - schedule.log_alpha(s)) * variance_s / variance_t,
        m=schedule.alpha(s) * skip / variance_t,
        z=np.sqrt(variance),
    )


def ddim(schedule: Schedule, steps: int, options: Options) -> Trajectory:
    """Denoising diffusion implicit models (DDIM, Song et al. 2021, arXiv:2010.02502, eq. 12 and 16).

    eps is derived again from x and the predicted x0, so that clipping x0 corrects both. eta = 0 is
    deterministic, eta = 1 is DDPM with the small variance.
    """
    times = grid(schedule, options, steps)
    t, s = times[:-1], times[1:]
    sigma_t, sigma_s = schedule.sigma(t), schedule.sigma(s)
    drawn = options.eta * np.sqrt(_skip_variance(schedule, t, s)) / sigma_t  # the share of sigma_s drawn anew
    direction = sigma_s * np.sqrt(np.maximum(1.0 - drawn**2, 0.0)) / sigma_t
    return assemble(
        "ddim",
        schedule,
        options,
        "x0",
        t,
        x=direction,
        m=schedule.alpha(s) - direction * schedule.alpha(t),
        z=drawn * sigma_s,
    )
