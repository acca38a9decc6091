"""Multistep DPM-Solver++ and its SDE form: one network call per step, order from the calls before it."""

from __future__ import annotations

import numpy as np

from sparse_engine.sampling.grid import grid
from sparse_engine.sampling.schedules import Float64, Schedule
from sparse_engine.sampling.trajectory import Options, Trajectory, assemble

FEW_STEPS = 15


def dpm_solver_pp(schedule: Schedule, steps: int, options: Options) -> Trajectory:
    """Multistep DPM-Solver++ 1, 2M, 3M (Lu et al. 2022, arXiv:2211.01095, algorithm 2; 3M as in its code).

    The first steps have the order their history allows. Under 15 steps the last ones go down in order
    again, as the authors' code does to keep few steps stable; a step to t = 0 is of first order. 3M gives the
    second difference half of its Taylor weight, as that code and its descendants do: it converges with order 2.
    In flow matching lambda is -inf at t = 1: the step from there is of first order, and so is the next, whose
    differences reach back to it.
    """
    times = grid(schedule, options, steps)
    alpha, sigma, lambdas = schedule.alpha(times), schedule.sigma(times), schedule.lambda_(times)
    rows = []
    for i, order in enumerate(_orders(times, options.order)):
        h = lambdas[i + 1] - lambdas[i]
        phi = np.expm1(-h)
        now, d1, d2 = -alpha[i + 1] * phi, 0.0, 0.0
        if order == 2:
            d1 = 0.5 * now
        elif order == 3:
            d1, d2 = alpha[i + 1] * (phi / h + 1.0), -alpha[i + 1] * ((phi + h) / h**2 - 0.5)
        rows.append(_history(now, d1, d2, lambdas, i, order))
    m, h1, h2 = np.array(rows).T
    return assemble("dpm-solver++", schedule, options, "x0", times[:-1], x=sigma[1:] / sigma[:-1], m=m, h1=h1, h2=h2)


def sde_dpm_solver_pp(schedule: Schedule, steps: int, options: Options) -> Trajectory:
    """SDE-DPM-Solver++ 1 and 2M (Lu et al. 2022, arXiv:2211.01095, the solvers for diffusion SDEs).

    The order of a step falls at both ends as for ``dpm_solver_pp``. Order 1 is ancestral sampling: DDIM with
    eta = 1.
    """
    times = grid(schedule, options, steps)
    alpha, sigma, lambdas = schedule.alpha(times), schedule.sigma(times), schedule.lambda_(times)
    h = np.diff(lambdas)
    rows = []
    for i, order in enumerate(_orders(times, options.order)):
        now = -alpha[i + 1] * np.expm1(-2.0 * h[i])
        rows.append(_history(now, 0.5 * now if order == 2 else 0.0, 0.0, lambdas, i, order))
    m, h1, h2 = np.array(rows).T
    return assemble(
        "sde-dpm-solver++",
        schedule,
        options,
        "x0",
        times[:-1],
        x=sigma[1:] / sigma[:-1] * np.exp(-h),
        m=m,
        h1=h1,
        h2=h2,
        z=sigma[1:] * np.sqrt(-np.expm1(-2.0 * h)),
    )


def _orders(times: Float64, order: int) -> list[int]:
    """The order of each step."""
    steps = len(times) - 1
    orders = [min(order, i + 1) for i in range(steps)]
    if steps < FEW_STEPS:
        orders = [min(k, steps - i) for i, k in enumerate(orders)]
    if times[-1] == 0:
        orders[-1] = 1
    return orders


def _history(now: float, d1: float, d2: float, lambdas: Float64, i: int, order: int) -> tuple[float, float, float]:
    """Coefficients (of m, h1, h2) of ``now * m + d1 * D1 + d2 * D2`` at step i.

    D1 and D2 are the finite differences of the model's output over lambda, in units of this step's h.
    """
    if order == 1:
        return now, 0.0, 0.0
    h = lambdas[i + 1] - lambdas[i]
    r0 = (lambdas[i] - lambdas[i - 1]) / h
    if order == 2:
        return now + d1 / r0, -d1 / r0, 0.0
    r1 = (lambdas[i - 1] - lambdas[i - 2]) / h
    # D1 = a + r0/(r0 + r1) (a - b), D2 = (a - b)/(r0 + r1), with a = (m - h1)/r0 and b = (h1 - h2)/r1.
    a = d1 + (d1 * r0 + d2) / (r0 + r1)
    b = -(d1 * r0 + d2) / (r0 + r1)
    return now + a / r0, -a / r0 + b / r1, -b / r1
