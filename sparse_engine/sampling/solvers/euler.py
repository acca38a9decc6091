"""Euler's method on the reverse SDE and on the probability-flow ODE: U-ViT's, SparseDM's and flow matching's."""

from __future__ import annotations

import numpy as np

from sparse_engine.sampling.grid import grid
from sparse_engine.sampling.schedules import FlowMatching, Schedule
from sparse_engine.sampling.trajectory import Options, Trajectory, assemble


def euler_sde(schedule: Schedule, steps: int, options: Options) -> Trajectory:
    """Euler-Maruyama on the reverse-time VP-SDE (Song et al. 2021, arXiv:2011.13456, eq. 6).

    x_s = x + (beta/2 x - beta/sigma eps) (t - s) + sqrt(beta (t - s)) z, with nothing drawn at s = 0. The
    default times are the U-ViT and SparseDM authors': 0 and ``steps`` equal steps over [1e-3, 1].
    """
    times = grid(schedule, options, steps)
    t, s = times[:-1], times[1:]
    rate = schedule.beta(t) * (t - s)
    drawn = np.where(s > 0, np.sqrt(rate), 0.0)
    return assemble("euler-sde", schedule, options, "eps", t, x=1.0 + 0.5 * rate, m=-rate / schedule.sigma(t), z=drawn)


def euler_ode(schedule: Schedule, steps: int, options: Options) -> Trajectory:
    """Euler's method on the probability-flow ODE (Song et al. 2021, arXiv:2011.13456, eq. 13).

    x_s = x + (beta/2 x - beta/(2 sigma) eps) (t - s), at the times of ``euler_sde``. In flow matching the ODE is
    dx/dsigma = eps - x0 (Esser et al. 2024, arXiv:2403.03206, eq. 1 and 13): x_s = x + (sigma_s - sigma_t) flow, at
    the authors' times: ``steps`` equal steps of t over [t_min, 1], shifted, and then 0.
    """
    times = grid(schedule, options, steps)
    t, s = times[:-1], times[1:]
    if isinstance(schedule, FlowMatching):
        return assemble("euler-ode", schedule, options, "flow", t, x=1.0, m=schedule.sigma(s) - schedule.sigma(t))
    rate = schedule.beta(t) * (t - s)
    return assemble("euler-ode", schedule, options, "eps", t, x=1.0 + 0.5 * rate, m=-0.5 * rate / schedule.sigma(t))
